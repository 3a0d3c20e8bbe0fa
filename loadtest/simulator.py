"""The scheduler in virtual time: an agenda of events, engine models, and the very calls the live driver makes.

A request lives here as it does behind gateway/dispatch.py: decide, prefill leg with one token, PrefillDone, decode leg
with the parameters of the first, FirstToken, Progress, Finished; an attempt that fails before its first token is
decided again. Everything that is random has a seed, equal instants happen in the order in which they were planned, so
the same settings give the same run to the last bit.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

from gateway.core.errors import BadRequest
from gateway.core.events import (
    AttemptFailed,
    EngineFound,
    EngineHealth,
    EngineReport,
    Event,
    FeedState,
    FirstToken,
    KvFeed,
    PrefillDone,
    Progress,
)
from gateway.core.events import Finished as AnswerFinished
from gateway.core.scheduler import Scheduler
from gateway.core.types import Dispatch, HandOff, Health, Reject, Request, Role
from loadtest.agenda import Agenda, Alarm
from loadtest.engine_types import EngineRequest, Finished, FinishReason, Outcome, PrefillFinished, RemoteKv, Tokens
from loadtest.flight import Flight
from loadtest.links import Links
from loadtest.prefix_pulls import PrefixPulls
from loadtest.report import Status
from loadtest.sim_engines import MODEL, PROGRESS_TOKENS, SimEngine, prefix_hashes
from loadtest.sim_faults import Faults
from loadtest.sim_gateway import ShellOf, SimGateway
from loadtest.sim_plan import LoadSample, Plan, Run
from loadtest.sim_returns import Visit, Visitors
from loadtest.sim_view import SimView
from loadtest.workload import TraceRequest


def simulate(plan: Plan, workload: Iterable[TraceRequest], *, shell_of: ShellOf = SimGateway) -> Run:
    """Runs the workload to its end."""
    return Simulation(plan, workload, shell_of=shell_of).run()


class Simulation:
    """One run under way."""

    def __init__(self, plan: Plan, workload: Iterable[TraceRequest], *, shell_of: ShellOf = SimGateway) -> None:
        self.agenda = Agenda()
        self._plan = plan
        self._run = Run(plan)
        self._arrivals = iter(workload)
        self._visitors = Visitors(plan.returning, plan.hammerers)
        self._in_flight: dict[str, Flight] = {}
        self._touched: dict[str, SimEngine] = {}
        """Engines whose next step may have moved since they were asked."""
        self._seen_changes = 0
        profile = plan.fleet.profile
        self._links = Links(bytes_per_s=profile.link_bytes_per_s, latency_s=profile.link_base_s)
        self._engines = {
            engine_id: SimEngine(engine_id, plan.fleet, self._links, seed=plan.seed)
            for engine_id in plan.fleet.engine_ids
        }
        self._alarms = {engine_id: Alarm(self.agenda, partial(self._step, engine_id)) for engine_id in self._engines}
        self._pulls = PrefixPulls(self._links, self.agenda, self._touched)
        self._gateways = [
            shell_of(self._scheduler(number), self.agenda, partial(self._decided, number))
            for number in range(plan.gateways)
        ]
        self._view: SimView | None = None
        if plan.gateways > 1 and plan.view_delay_s is not None:
            self._view = SimView(self._gateways, self.agenda, delay_s=plan.view_delay_s)
        self._expect_next()
        self._begin()

    # ---- the run ----------------------------------------------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        """Whether every client of the workload came and will not come again."""
        return self._next_arrival is None and not self._visitors.open_count

    def run(self) -> Run:
        """Lets everything happen; what it came to."""
        while not self.is_over:
            self.step()
        return self.finish()

    def step(self) -> float:
        """Lets the next thing happen; when that was."""
        at = self.agenda.step()
        self.refresh(at)
        self._run.duration_s = at
        return at

    def finish(self) -> Run:
        """The run's figures, when it is over."""
        run = self._run
        stages = {letter: [e for e in self._engines.values() if e.id[0] in letter + "e"] for letter in "pd"}
        ratios = {
            letter: sum(engine.total_busy_s for engine in engines) / (len(engines) * run.duration_s)
            for letter, engines in stages.items()
            if run.duration_s > 0
        }
        run.prefill_busy_ratio, run.decode_busy_ratio = ratios.get("p"), ratios.get("d")
        return run

    def _begin(self) -> None:
        for engine in self._engines.values():
            self.tell_all(EngineFound(engine.facts), 0.0)
            self.tell_all(EngineHealth(engine.id, Health.UP), 0.0)
            self.tell_all(KvFeed(engine.id, FeedState.LIVE, (engine.id,)), 0.0)
        self.agenda.note(0.0, self._report)
        self.agenda.note(0.0, self._sample)
        for visit in self._visitors.hammerers:
            self.agenda.note(0.0, partial(self._come, visit))
        Faults(self._plan.faults, self.agenda, self._engines, self._links, self)

    def _scheduler(self, number: int) -> Scheduler:
        plan = self._plan
        blocks = sum(engine.facts.kv_capacity_tokens or 0 for engine in self._engines.values())
        return Scheduler(
            policy=plan.policy,
            predictor=plan.predictor,
            admission=plan.admission,
            lengths=plan.lengths,
            margins=plan.margins,
            limits=plan.limits,
            rng=random.Random(f"gateway {number} {plan.seed}"),
            max_blocks=max(1024, 2 * blocks // plan.fleet.block_tokens),
            tenant_weights=plan.tenant_weights,
        )

    def refresh(self, now: float) -> None:
        """Asks the engines anew when they have something to do: all of them when a transfer began or ended."""
        has_moved = self._links.change_count != self._seen_changes
        for engine_id, engine in (self._engines if has_moved else self._touched).items():
            if engine.model is not None:
                self._alarms[engine_id].set(engine.model.next_step_at(), now=now)
        if has_moved:
            self._pulls.refresh(now)
            self._seen_changes = self._links.change_count
        self._touched.clear()

    # ---- arrivals and decisions -------------------------------------------------------------------------------------

    def _expect_next(self) -> None:
        self._next_arrival = next(self._arrivals, None)
        if self._next_arrival is not None:
            self.agenda.note(self._next_arrival.arrival_s, self._arrive)

    def _arrive(self, now: float) -> None:
        trace = self._next_arrival
        assert trace is not None, "an arrival was noted for it"
        visit = self._visitors.first(len(self._run.flights), trace)
        self._expect_next()
        self._come(visit, now)

    def _come(self, visit: Visit, now: float) -> None:
        flight = self._flight(visit, now)
        self._in_flight[flight.request.id] = flight
        self._run.came(flight)
        self._gateways[flight.gateway].decide(flight.request, now=now)

    def _flight(self, visit: Visit, now: float) -> Flight:
        trace = visit.trace
        size = self._plan.fleet.block_tokens
        full = () if trace.block_ids is None else trace.block_ids[: trace.prompt_tokens // size]
        hashes = prefix_hashes(full)
        request = Request(
            id=visit.request_id,
            model=MODEL,
            arrived_at=now,
            prompt_tokens=trace.prompt_tokens,
            is_prompt_exact=True,
            block_hashes={size: hashes} if full else {},
            slo=self._plan.slo,
            tenant=trace.tenant,
            client=visit.client_number,
            priority=self._plan.priorities.get(trace.tenant, 0),
        )
        return Flight(visit, request, visit.client % len(self._gateways), tuple(hashes.tolist()))

    def _decided(self, gateway: int, decision: Dispatch | Reject | HandOff, now: float) -> None:
        flight = self._in_flight[decision.request_id]
        if isinstance(decision, HandOff):
            self._hand_off(flight, decision, now)
            return
        if isinstance(decision, Reject):
            if self._view is not None:
                self._view.ended(gateway, decision.request_id, now)
            flight.is_refused_after_prefill = flight.dispatch is not None
            self._end(flight, Status.REFUSED, now, str(decision.reason), told_s=decision.retry_after_s)
            return
        flight.dispatch, flight.sent_at = decision, now
        flight.prefill = self._engines[decision.estimate.prefill]
        flight.decode = self._engines[decision.estimate.decode]
        flight.predicted_ttft_s = now - flight.request.arrived_at + decision.estimate.ttft_s
        if self._view is not None:
            self._view.sent(gateway, flight.request, decision, now)
        if decision.estimate.fetch_from is not None:
            self._pulls.start(flight, self._plan.fleet.profile.kv_bytes_per_token, now=now)
        self._submit(flight, flight.prefill, now, max_tokens=1 if flight.is_hand_off else None)

    def _hand_off(self, flight: Flight, decision: HandOff, now: float) -> None:
        """The decode leg, to the engine that was chosen when the prefill ended."""
        assert flight.held is not None, "its prefill is over"
        flight.decode = self._engines[decision.decode]
        flight.predicted_tbt_s = decision.tbt_s
        self._submit(flight, flight.decode, now, remote=flight.held)
        if (
            self._view is not None
            and flight.dispatch is not None
            and decision.decode != flight.dispatch.estimate.decode
        ):
            estimate = replace(flight.dispatch.estimate, decode=decision.decode)
            self._view.handed_off(flight.gateway, flight.request, replace(flight.dispatch, estimate=estimate), now)

    def _submit(
        self,
        flight: Flight,
        engine: SimEngine,
        now: float,
        *,
        max_tokens: int | None = None,
        remote: RemoteKv | None = None,
    ) -> None:
        if engine.model is None or flight.dispatch is None:
            self._fail(flight, engine.id, "engine_unreachable", now)
            return
        leg = EngineRequest(
            id=flight.leg_id,
            prompt_tokens=flight.trace.prompt_tokens,
            max_tokens=max_tokens or flight.trace.output_tokens,
            block_keys=flight.keys,
            is_kv_held=max_tokens is not None,
            is_prefix_pending=remote is None and flight.dispatch.estimate.fetch_from is not None,
            remote=remote,
        )
        try:
            engine.model.submit(leg, now=now)
        except BadRequest:
            self._fail(flight, engine.id, "engine_refused", now)
            return
        engine.legs[flight.leg_id] = flight
        self._touched[engine.id] = engine

    # ---- engines ----------------------------------------------------------------------------------------------------

    def _step(self, engine_id: str, now: float) -> None:
        engine = self._engines[engine_id]
        if engine.model is None:
            return
        self._touched[engine_id] = engine
        outcomes = engine.model.step(now=now)
        for blocks in engine.take_block_events():
            self.tell_all(blocks, now)
        for outcome in outcomes:
            self._take(engine, outcome, now)

    def _take(self, engine: SimEngine, outcome: Outcome, now: float) -> None:
        match outcome:
            case Tokens(request_ids, token_at):
                for request_id in request_ids:
                    flight = engine.legs.get(request_id)
                    if flight is not None and flight.decode is engine:
                        flight.take_tokens(token_at)
                        self._tell_progress(flight, now)
            case PrefillFinished(request_id, _, cached_tokens):
                flight = engine.legs.get(request_id)
                if flight is not None and flight.prefill is engine:
                    flight.cached_tokens = cached_tokens
                    flight.prefilled_tokens += flight.trace.prompt_tokens - cached_tokens
            case Finished(request_id):
                flight = engine.legs.pop(request_id, None)
                if flight is not None:
                    self._leg_over(flight, engine, outcome, now)

    def _tell_progress(self, flight: Flight, now: float) -> None:
        if flight.first_token_at is None:
            flight.first_token_at = now
            self._tell(flight, FirstToken(flight.request.id), now)
        elif flight.output_tokens - flight.told_tokens >= PROGRESS_TOKENS:
            flight.told_tokens = flight.output_tokens
            self._tell(flight, Progress(flight.request.id, flight.output_tokens), now)

    def _leg_over(self, flight: Flight, engine: SimEngine, outcome: Finished, now: float) -> None:
        if outcome.reason is not FinishReason.LENGTH:
            self._fail(flight, engine.id, f"engine_{outcome.reason}", now)
        elif outcome.held is None:
            self._finish(flight, now)
        else:
            flight.held = RemoteKv(outcome.held.block_ids, engine.id, outcome.request_id, engine.id, 0)
            done = PrefillDone(flight.request.id, cached_tokens=outcome.held.cached_tokens, awaits_decode=True)
            self._tell(flight, done, now)

    # ---- ends -------------------------------------------------------------------------------------------------------

    def _finish(self, flight: Flight, now: float) -> None:
        outcome = flight.end(Status.OK, now)
        event = AnswerFinished(
            flight.request.id,
            output_tokens=flight.output_tokens,
            prompt_tokens=flight.trace.prompt_tokens,
            cached_tokens=flight.cached_tokens,
            tbt_s=outcome.tbt_s,
        )
        del self._in_flight[flight.request.id]
        self._tell(flight, event, now)
        self._over(flight, now)

    def _fail(self, flight: Flight, engine_id: str, reason: str, now: float) -> None:
        """The attempt is over: tried again unless the client has seen a token, as in gateway/dispatch.py."""
        for engine in (flight.prefill, flight.decode):
            leg = None if engine is None else engine.legs.pop(flight.leg_id, None)
            if engine is not None and leg is not None and engine.model is not None:
                engine.model.abort(flight.leg_id, now=now)
                self._touched[engine.id] = engine
        if flight.first_token_at is not None:
            self._end(flight, Status.ERROR, now, reason)
            self._tell(flight, AnswerFinished(flight.request.id, output_tokens=flight.output_tokens), now)
            return
        self._tell(flight, AttemptFailed(flight.request.id, engine_id, reason), now)
        avoid = tuple(dict.fromkeys((*flight.request.avoid, engine_id)))
        flight.start_over()
        flight.request = replace(flight.request, attempt=flight.request.attempt + 1, avoid=avoid)
        self._gateways[flight.gateway].decide(flight.request, now=now)

    def _end(self, flight: Flight, status: Status, now: float, reason: str, *, told_s: float | None = None) -> None:
        del self._in_flight[flight.request.id]
        flight.end(status, now, reason)
        self._over(flight, now, told_s)

    def _over(self, flight: Flight, now: float, told_s: float | None = None) -> None:
        """The client has its answer, or comes back for it."""
        again = self._visitors.over(flight, told_s, now)
        if again is not None:
            self.agenda.note(again[0], partial(self._come, again[1]))

    def fail_all(self, engine: SimEngine, now: float) -> None:
        """The engine died: every leg on it is over."""
        legs, engine.legs = engine.legs, {}
        for flight in legs.values():
            self._fail(flight, engine.id, "engine_lost", now)

    # ---- what gateways are told -------------------------------------------------------------------------------------

    def _tell(self, flight: Flight, event: Event, now: float) -> None:
        """Its own gateway learns at once what happened to a request, the others later, if at all."""
        self._gateways[flight.gateway].apply(event, now=now)
        if self._view is not None:
            self._view.told(flight.gateway, event, now)

    def tell_all(self, event: Event, now: float) -> None:
        """Every gateway learns at once what happened to an engine."""
        for gateway in self._gateways:
            gateway.apply(event, now=now)

    def _report(self, now: float) -> None:
        counted = [(engine.id, engine.report()) for engine in self._engines.values()]
        reports = [EngineReport(engine_id, report) for engine_id, report in counted if report is not None]
        self.agenda.note(now + self._plan.report_delay_s, partial(self._read_reports, reports))
        self.agenda.note(now + self._plan.report_interval_s, self._report)

    def _read_reports(self, reports: Sequence[EngineReport], now: float) -> None:
        for report in reports:
            self.tell_all(report, now)

    def _sample(self, now: float) -> None:
        states = self._gateways[0].scheduler.cluster.engines.values()
        work_s = [state.prefill_work_s(now) for state in states if state.engine.role is not Role.DECODE]
        decoding = [state.producing_count for state in states if state.engine.role is not Role.PREFILL]
        means = sum(work_s) / len(work_s), sum(decoding) / len(decoding)
        self._run.samples.append(LoadSample(now, *means, in_flight_count=len(self._in_flight)))
        self.agenda.note(now + self._plan.sample_interval_s, self._sample)
