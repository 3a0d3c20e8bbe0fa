"""Whole properties of the scheduler, under any interleaving of requests, events and time."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from gateway.core.events import (
    AttemptFailed,
    EngineFound,
    EngineHealth,
    EngineLost,
    EngineReport,
    Finished,
    FirstToken,
    Left,
    PrefillDone,
    Progress,
)
from gateway.core.types import Decision, Dispatch, Health, Report, Role, Slo, Wait
from tests.builders import a_request, a_scheduler, an_engine

ENGINES = {"p1": Role.PREFILL, "p2": Role.PREFILL, "d1": Role.DECODE, "d2": Role.DECODE, "b1": Role.BOTH}
MAX_WAITING = 3
MAX_IN_FLIGHT = 2
SLOS = st.builds(Slo, ttft_s=st.none() | st.floats(0.1, 20), deadline_s=st.none() | st.floats(0.1, 40))


class SchedulerUnderFire(RuleBasedStateMachine):
    """Requests come and go, engines flap, events come twice, late, or about nobody."""

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        engines = [an_engine(name, role) for name, role in ENGINES.items()]
        self.scheduler = a_scheduler(*engines, max_waiting=MAX_WAITING, max_in_flight_per_engine=MAX_IN_FLIGHT)
        self.now = 0.0
        self.count = 0
        self.in_flight: set[str] = set()
        self.waiting: set[str] = set()

    def take(self, decision: Decision) -> None:
        self.waiting.discard(decision.request_id)
        if isinstance(decision, Dispatch):
            self.in_flight.add(decision.request_id)
        elif isinstance(decision, Wait):
            self.waiting.add(decision.request_id)

    @rule(target=requests, tokens=st.integers(1, 5000), can_hand_off=st.booleans(), rank=st.integers(0, 2), slo=SLOS)
    def arrive(self, tokens: int, can_hand_off: bool, rank: int, slo: Slo) -> str:
        self.count += 1
        request = a_request(
            f"r{self.count}",
            arrived_at=self.now,
            prompt_tokens=tokens,
            can_hand_off=can_hand_off,
            priority=rank,
            tenant=f"t{rank}",
            slo=slo,
        )
        self.take(self.scheduler.decide(request, now=self.now))
        return request.id

    @rule(seconds=st.floats(0, 20))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        wake_at = self.scheduler.next_wakeup()
        if wake_at is not None and wake_at <= self.now:
            for decision in self.scheduler.wake(now=self.now):
                assert not isinstance(decision, Wait)
                self.take(decision)

    @rule(request_id=requests, tokens=st.integers(0, 3000))
    def goes_on(self, request_id: str, tokens: int) -> None:
        for event in (PrefillDone(request_id), FirstToken(request_id), Progress(request_id, tokens)):
            self.scheduler.apply(event, now=self.now)

    @rule(request_id=requests, how=st.sampled_from(["finished", "failed", "left"]))
    def ends(self, request_id: str, how: str) -> None:
        events = {
            "finished": Finished(request_id, tbt_s=0.05),
            "failed": AttemptFailed(request_id, None, "lost"),
            "left": Left(request_id),
        }
        self.scheduler.apply(events[how], now=self.now)
        self.in_flight.discard(request_id)
        if how != "finished":
            self.waiting.discard(request_id)

    @rule(name=st.sampled_from(sorted(ENGINES)), health=st.sampled_from(list(Health)))
    def flaps(self, name: str, health: Health) -> None:
        self.scheduler.apply(EngineHealth(name, health), now=self.now)

    @rule(name=st.sampled_from(sorted(ENGINES)), running=st.integers(0, 5), waiting=st.integers(0, 5))
    def reports(self, name: str, running: int, waiting: int) -> None:
        self.scheduler.apply(EngineReport(name, Report(running, waiting)), now=self.now)

    @rule(name=st.sampled_from(sorted(ENGINES)), comes_back=st.booleans())
    def leaves(self, name: str, comes_back: bool) -> None:
        self.scheduler.apply(EngineLost(name), now=self.now)
        if comes_back:
            self.scheduler.apply(EngineFound(an_engine(name, ENGINES[name])), now=self.now)
            self.scheduler.apply(EngineHealth(name, Health.UP), now=self.now)

    @invariant()
    def the_ledger_adds_up(self) -> None:
        self.scheduler.cluster.check()
        assert self.scheduler.cluster.reservations.keys() == self.in_flight

    @invariant()
    def bounds_hold(self) -> None:
        assert self.scheduler.waiting_count <= min(len(self.waiting), MAX_WAITING)  # less those told at the next wake
        for state in self.scheduler.cluster.engines.values():
            assert state.own_count <= MAX_IN_FLIGHT
            assert min(state.prefill_us, state.queued_tokens, state.kv_tokens, state.others_count) >= 0
            assert state.prefill_work_s(self.now) >= 0.0

    @invariant()
    def nobody_waits_without_a_wakeup(self) -> None:
        assert (self.scheduler.next_wakeup() is None) == (not self.waiting)


TestSchedulerUnderFire = SchedulerUnderFire.TestCase
TestSchedulerUnderFire.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
