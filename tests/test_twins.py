"""The live driver in virtual time and the simulator take the same decisions; a journal fed back gives them again."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import pytest

from gateway.admissions.sluice import Sluice
from gateway.admissions.ttft import Ttft
from gateway.core.admission import AdmissionLimits
from gateway.core.events import Event, PrefillDone
from gateway.core.scheduler import Scheduler
from gateway.core.types import Decision, Dispatch, HandOff, Reject, RejectReason, Request, Slo, Wait, WaitReason
from gateway.driver import Driver
from gateway.journal import Journal
from gateway.policies import POLICIES
from loadtest.agenda import Agenda
from loadtest.fault_plan import Fault, FaultKind, draw_faults
from loadtest.generators import generate
from loadtest.sim_engines import Fleet
from loadtest.sim_gateway import OnDecision, SimGateway
from loadtest.sim_plan import Plan
from loadtest.simulator import Simulation, simulate
from loadtest.workload import TraceRequest, scaled
from predictors.online import Online
from predictors.profile import load_profile
from tests.virtual_loop import VirtualLoop

SEEDS = range(20)
FLEET = Fleet(load_profile("llama3-8b-1xh100"), prefill=2, decode=2, block_tokens=16)
TIGHT = AdmissionLimits(max_in_flight_per_engine=12, max_waiting=15, max_wait_s=1.0)
"""So that requests wait, are sent later, wait too long and find the queue full."""

DEATH = Fault(FaultKind.DIES, "p1", at_s=2.0, duration_s=0.5)
"""So that requests are decided again."""


@dataclass
class Memory(Journal):
    """A journal that keeps its values."""

    calls: list[tuple[str, float, object]] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)

    def event(self, event: Event, now: float) -> None:
        self.calls.append(("apply", now, event))

    def decided(self, request: Request, decision: Decision, now: float) -> None:
        self.calls.append(("decide", now, request))
        self.decisions.append(decision)

    def woke(self, decisions: Iterable[Decision], now: float) -> None:
        self.calls.append(("wake", now, None))
        self.decisions.extend(decisions)


def a_plan(seed: int) -> Plan:
    names = sorted(POLICIES)
    return Plan(
        fleet=FLEET,
        policy=POLICIES[names[seed % len(names)]](),
        predictor=Online(),
        admission=Ttft() if seed % 2 else Sluice(),
        slo=Slo(ttft_s=0.9, tbt_s=0.05),
        seed=seed,
        limits=TIGHT,
        report_interval_s=0.37,
        faults=(DEATH, *draw_faults(2, FLEET.engine_ids, span_s=5.0, seed=seed)),
    )


def a_workload(seed: int) -> list[TraceRequest]:
    return list(scaled(islice(generate("azure-conversation", seed=seed), 150), speed=5.0))


class LiveGateway:
    """The live driver, under the simulation's engines."""

    def __init__(self, driver: Driver, on_decision: OnDecision) -> None:
        self.scheduler = driver.scheduler
        self._driver = driver
        self._on_decision = on_decision
        self._tasks: set[asyncio.Task[None]] = set()

    def decide(self, request: Request, *, now: float) -> None:
        self._start(self._decide(request))

    def _start(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _decide(self, request: Request) -> None:
        decided = await self._driver.decide(request)
        self._on_decision(decided.decision, self._driver.now())

    def apply(self, event: Event, *, now: float) -> None:
        """In the loop's order: after the decisions that were asked for before."""
        if isinstance(event, PrefillDone):
            self._start(self._hand_off(event))
        else:
            asyncio.get_running_loop().call_soon(self._driver.apply, event)

    async def _hand_off(self, event: PrefillDone) -> None:
        decision = await self._driver.prefilled(event)
        if decision is not None:
            self._on_decision(decision, self._driver.now())

    def settle(self, *, now: float) -> None:
        """The live driver wakes the scheduler by itself."""


async def run_live(plan: Plan, workload: list[TraceRequest], journal: Journal) -> None:
    """The simulation's world around a live driver: steps at its instants, and everything that is ready in between."""
    loop = asyncio.get_running_loop()
    turn = loop.create_future()

    def end_turn() -> None:
        if not turn.done():
            turn.set_result(None)

    def shell(scheduler: Scheduler, agenda: Agenda, on_decision: OnDecision) -> LiveGateway:
        def carry_out(decision: Dispatch | Reject | HandOff, now: float) -> None:
            on_decision(decision, now)
            simulation.refresh(now)
            end_turn()  # what is due next may have changed

        return LiveGateway(Driver(scheduler, journal), carry_out)

    simulation = Simulation(plan, workload, shell_of=shell)
    while not simulation.is_over:
        due_at = simulation.agenda.next_at
        assert due_at is not None, "a run that is not over goes on"
        if due_at <= loop.time():
            simulation.step()
            for _ in range(6):  # a decision and the wake-ups that follow it take a few turns of the loop
                await asyncio.sleep(0)
            continue
        turn = loop.create_future()
        timer = loop.call_at(due_at, end_turn)
        await turn
        timer.cancel()


def told(decision: Decision) -> tuple[object, ...]:
    """What is compared: which way, which pair, why; the live clock may be a rounding later."""
    match decision:
        case Dispatch(request_id, attempt, estimate):
            return request_id, attempt, estimate.prefill, estimate.decode, estimate.fetch_from
        case HandOff(request_id, decode):
            return request_id, decode
        case Reject(request_id, reason):
            return request_id, reason
        case _:
            return decision.request_id, decision.reason


@pytest.mark.parametrize("seed", SEEDS)
def test_the_live_driver_and_the_simulator_decide_alike(seed: int) -> None:
    live, simulated = Memory(), Memory()
    simulate(a_plan(seed), a_workload(seed), shell_of=partial(SimGateway, journal=simulated))
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(run_live(a_plan(seed), a_workload(seed), live))
    assert [told(decision) for decision in live.decisions] == [told(decision) for decision in simulated.decisions]


def test_the_seeds_hold_every_kind_of_decision() -> None:
    journal = Memory()
    runs = [
        simulate(a_plan(seed), a_workload(seed), shell_of=partial(SimGateway, journal=journal)) for seed in SEEDS[:4]
    ]
    reasons = {decision.reason for decision in journal.decisions if isinstance(decision, Wait | Reject)}
    assert reasons >= {WaitReason.ENGINES_FULL, RejectReason.QUEUE_FULL, RejectReason.TTFT_SLO, WaitReason.PREFILL_BUSY}
    assert max(flight.request.attempt for run in runs for flight in run.flights) > 1


@pytest.mark.parametrize("seed", SEEDS[:5])
def test_a_journal_fed_back_gives_the_same_decisions(seed: int) -> None:
    plan, journal = a_plan(seed), Memory()
    simulate(plan, a_workload(seed), shell_of=partial(SimGateway, journal=journal))
    scheduler = Scheduler(
        policy=plan.policy,
        predictor=plan.predictor,
        admission=plan.admission,
        lengths=plan.lengths,
        margins=plan.margins,
        limits=plan.limits,
        rng=random.Random(f"gateway 0 {seed}"),
        max_blocks=200_000,
    )
    again: list[Decision] = []
    for what, now, value in journal.calls:
        if isinstance(value, Request):
            again.append(scheduler.decide(value, now=now))
        elif what == "wake":
            again += scheduler.wake(now=now)
        else:
            scheduler.apply(value, now=now)  # type: ignore[arg-type]
    assert again == journal.decisions
