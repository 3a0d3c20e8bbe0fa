"""The one door of the core: a prefill and a decode engine for each request, a wait, or a refusal at once.

Gather, decide, act: by the time `decide` is called everything needed is an argument or already in the ledger; what it
returns is booked before it returns. Nothing here awaits, logs, or looks at a clock. The live driver and the simulator
make the same calls, and a journal of them fed back gives the same decisions.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import inf

import numpy as np

from gateway.core.admission import AdmissionLimits, AdmitAll, refuse_unservable
from gateway.core.candidates import Candidates, best_of
from gateway.core.cluster import Cluster, EngineState, Reservation
from gateway.core.estimate import breaks_promise, estimate_at, estimate_pairs, kept_rows, may_decode
from gateway.core.events import (
    AttemptFailed,
    BlocksCleared,
    BlocksRemoved,
    BlocksStored,
    EngineFound,
    EngineHealth,
    EngineLost,
    EngineReport,
    Event,
    Finished,
    FirstToken,
    Joined,
    KvFeed,
    Left,
    PeerGone,
    PeerHolds,
    PeerMoved,
    PeerSent,
    PrefillDone,
    Progress,
)
from gateway.core.fairness import Fairness
from gateway.core.forecast import Forecast, StepLines
from gateway.core.interfaces import (
    Admission,
    Arrival,
    EngineLoad,
    Lengths,
    LineUp,
    Margins,
    PairTable,
    Patience,
    Policy,
    Predictor,
    PrefillEnd,
    Refusal,
    WeighsHandOff,
)
from gateway.core.learning import Learning
from gateway.core.leases import Leases
from gateway.core.pace import Pace
from gateway.core.prefixes import Prefixes
from gateway.core.returns import Returns, place_return_s, prefill_return_s
from gateway.core.types import (
    Decision,
    Dispatch,
    Estimate,
    HandOff,
    Health,
    Reject,
    RejectReason,
    Request,
    Role,
    Wait,
    WaitReason,
)
from gateway.core.waiting import Ended, Group, WaitingQueue, group_of, latest_start_at

RUNNERS_UP = 3
STALL_QUANTILE = 0.99
"""Of the step into which a prefill is mixed: one that is too long is too long for everybody in the batch."""


class Scheduler:
    """Chooses a prefill and a decode engine for each request, lets it wait, or refuses it at once."""

    def __init__(
        self,
        *,
        policy: Policy,
        predictor: Predictor,
        limits: AdmissionLimits,
        rng: random.Random,
        max_blocks: int,
        admission: Admission | None = None,
        lengths: Lengths | None = None,
        margins: Margins | None = None,
        tenant_weights: Mapping[str, float] | None = None,
    ) -> None:
        """Nothing known yet. `max_blocks` >= 1 bounds the prefix index (31 bytes each, taken at once).

        Without an admission rule nobody is refused whom an engine could serve at all. Without a belief about output
        lengths no request is expected to end; without margins a prediction is taken at its word. `tenant_weights` > 0
        are the shares of tenants when requests have to wait; a tenant not named has 1.
        """
        self.cluster = Cluster()
        self.prefixes = Prefixes(max_blocks=max_blocks, max_age_s=limits.observed_age_s)
        self.leases = Leases(self.cluster, self.prefixes)
        self.limits = limits
        self.kept_candidates = 0
        """How many pairs of each decision `candidates` holds; 0: none, and nothing is spent on it."""
        self.candidates: dict[str, Candidates] = {}
        """By request id, what the last `decide` or `wake` chose from: for the shell to explain it."""
        self._chooser = policy.start(rng)
        self._offers_local = isinstance(policy, WeighsHandOff) and policy.can_skip_hand_off
        self._estimator = predictor.start()
        self._gate = (admission or AdmitAll()).start()
        self._line_up: LineUp | None = self._gate if isinstance(self._gate, LineUp) else None
        self._lines = StepLines(self._estimator)
        self._learning = Learning(
            self._estimator,
            self._lines,
            law=None if lengths is None else lengths.start(),
            margins=None if margins is None else margins.start(),
        )
        self._waiting = WaitingQueue(
            limits.max_waiting, fairness=Fairness(tenant_weights), starve_s=limits.max_starve_s
        )
        self._finishes = Pace()
        self._returns = Returns()
        self._room_at: float | None = None
        """When room may have appeared for a waiting request; None: not since the last `wake`."""
        self._patience: dict[str, Patience] = {}
        """Why those wait whom the admission rule lets wait."""
        self._between: dict[str, Patience | None] = {}
        """Requests between their legs, in the order in which their prefills ended, and what they wait for."""
        self._between_at: float | None = None
        """When one of them may go on; None: not before something happens."""
        self._stopped: list[Reject] = []
        """Requests put out of the queue, for `wake` to name."""
        self._stopped_at = 0.0

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """The KV block sizes in use, in tokens, ascending: the sizes at which prompts are to be hashed."""
        sizes = {state.engine.block_tokens for state in self.cluster.engines.values()}
        return tuple(sorted(size for size in sizes if size is not None))

    def is_between(self, request_id: str) -> bool:
        """Whether `wake` will say where the request decodes: its prefill is done, its shell waits to be told."""
        return request_id in self._between

    @property
    def waiting_count(self) -> int:
        """Requests waiting in the gateway."""
        return len(self._waiting)

    # ---- decisions --------------------------------------------------------------------------------------------------

    def decide(self, request: Request, *, now: float) -> Dispatch | Wait | Reject:
        """Dispatch, Wait or Reject for this request, already booked. A retry is the same request with `attempt` + 1."""
        assert request.id not in self._waiting, f"request {request.id} is decided while it waits"
        if request.attempt == 1 and self._returns.take(request, now=now):
            request = replace(request, is_expected=True)
        self.candidates.clear()
        self.cluster.turns.arrived(now)
        return self._decide(request, now)

    def wake(self, *, now: float) -> list[Decision]:
        """New decisions for requests that waited: refusals of those whose time is over, dispatches of those with room.

        Requests that go on waiting are not named again. A refusal may also name a request whose prefill just ended, or
        one that had to go so that another may wait.
        """
        self._room_at = None
        self.cluster.turns.is_arrival = False
        self.leases.expire(now=now)
        self.candidates.clear()
        decisions: list[Decision] = [*self._stopped]
        self._stopped.clear()
        decisions += self._hand_offs(now)
        decisions += [self._end_wait(ended, now) for ended in self._waiting.remove_ended(now)]
        full: list[Group] = []
        for request in self._order(now):
            if len(full) == self._waiting.group_count:
                break
            group = group_of(request)
            if group in full:
                continue
            decision = self._try(request, now)
            if decision is None:
                full.append(group)
            elif isinstance(decision, Patience):
                self._go_on_waiting(request, decision)
            else:
                self._forget_waiting(request.id)
                decisions.append(decision)
        self._wake_again(now)
        return decisions

    def _end_wait(self, ended: Ended, now: float) -> Reject:
        request, patience = ended.request, self._patience.get(ended.request.id)
        self._forget_waiting(request.id)
        if ended.is_late and patience is not None:
            return self._refuse_by_rule(request, patience.refusal, patience.best, now)
        if ended.is_late:
            is_ttft = (request.slo.ttft_s or inf) <= (request.slo.deadline_s or inf)
            bound_s = request.slo.ttft_s if is_ttft else request.slo.deadline_s
            message = f"it waited {now - request.arrived_at:.3g} s; its bound of {bound_s:g} s can no longer be kept"
            return self._refuse(request, RejectReason.TTFT_SLO if is_ttft else RejectReason.DEADLINE_SLO, message, now)
        message = f"no engine had room within {self.limits.max_wait_s:g} s"
        return self._refuse(request, RejectReason.WAITED_TOO_LONG, message, now)

    def next_wakeup(self) -> float | None:
        """When `wake` has something to do; None: nobody waits and no lease runs. An instant in the past means now."""
        ends = [patience.latest_at for patience in self._between.values() if patience is not None]
        if self._stopped:
            ends.append(self._stopped_at)
        others = [self._between_at, self.leases.next_end_at()]
        if self._waiting:
            others += [self._waiting.next_end_at(), self._room_at]
        return min((*ends, *(at for at in others if at is not None)), default=None)

    def _decide(self, request: Request, now: float) -> Dispatch | Wait | Reject:
        is_behind = self._line_up is None and self._waiting.has_group(group_of(request))
        decision = refuse_unservable(request, self.cluster, self.limits) if is_behind else self._try(request, now)
        patience = decision if isinstance(decision, Patience) else None
        if decision is not None and not isinstance(decision, Patience):
            return decision
        until_at = request.arrived_at + self.limits.max_wait_s
        if until_at <= now:
            return self._refuse(request, RejectReason.WAITED_TOO_LONG, "its time to wait is over", now)
        if self._waiting.is_full and not self._make_room(request, now):
            return self._refuse(request, RejectReason.QUEUE_FULL, f"{len(self._waiting)} requests wait already", now)
        if not self._waiting:
            self._room_at = None  # what changed before was seen by this very attempt
        latest_at = latest_start_at(request) if patience is None else patience.latest_at
        self._waiting.add(request, until_at, latest_at)
        if is_behind:
            self._room_at = now  # it may be the first of those who wait
        self._wake_again(now)
        if patience is None:
            return Wait(request.id, WaitReason.ENGINES_FULL, until_at)
        self._patience[request.id] = patience
        return Wait(request.id, patience.reason, min(until_at, latest_at))

    def _order(self, now: float) -> Iterable[Request]:
        """Whom to try: all in the queue's order, or as the admission rule lines them up."""
        order = self._waiting.in_order(now=now)
        return order if self._line_up is None else self._line_up.line_up(order, self.cluster, now=now)

    def _wake_again(self, now: float) -> None:
        if self._line_up is not None and self._waiting:
            again_at = self._line_up.again_at(self.cluster, now=now)
            self._room_at = again_at if self._room_at is None else min(self._room_at, again_at)

    def _go_on_waiting(self, request: Request, patience: Patience) -> None:
        """What it waits for may have changed, and how long it can."""
        known = self._patience.get(request.id)
        if known is None or known.latest_at != patience.latest_at:
            self._waiting.remove(request.id)
            self._waiting.add(request, request.arrived_at + self.limits.max_wait_s, patience.latest_at)
        self._patience[request.id] = patience

    def _forget_waiting(self, request_id: str) -> None:
        self._waiting.remove(request_id)
        self._patience.pop(request_id, None)
        if self._line_up is not None:
            self._line_up.left(request_id)

    def _make_room(self, newcomer: Request, now: float) -> bool:
        """Refuses one of those who wait in the newcomer's place; False when nobody is to go before it."""
        last = self._waiting.make_room(newcomer)
        if last is None:
            return False
        self._forget_waiting(last.id)
        message = f"{self.limits.max_waiting} requests wait already, and one came that goes before it"
        self._stopped.append(self._refuse(last, RejectReason.QUEUE_FULL, message, now))
        self._stopped_at = now
        return True

    def _try(self, request: Request, now: float) -> Dispatch | Reject | Patience | None:
        """A dispatch or a refusal now, or why it is to wait; None when engines exist and all of them are full."""
        refusal = refuse_unservable(request, self.cluster, self.limits)
        if refusal is not None:
            return refusal
        pairs, forecast = self._candidate_pairs(request, now)
        if len(pairs) == 0:
            return None
        costs = self._chooser.costs(request, pairs, now=now)
        if self.kept_candidates:
            self.candidates[request.id] = best_of(pairs, costs, keep=self.kept_candidates)
        arrival = Arrival(
            request, pairs, costs, self.cluster, self._estimator, forecast, self._learning.law, self._learning.margins
        )
        allowed = self._gate.arrive(arrival, now=now)
        if isinstance(allowed, Refusal):
            return self._refuse_by_rule(request, allowed, estimate_at(pairs, arrival.chosen_row), now)
        if isinstance(allowed, Patience):
            return allowed
        if allowed is not None:
            costs = np.where(allowed, costs, np.inf)
        best = np.argsort(costs, kind="stable")[: RUNNERS_UP + 1]
        dispatch = Dispatch(
            request_id=request.id,
            attempt=request.attempt,
            estimate=estimate_at(pairs, int(best[0])),
            runners_up=tuple(estimate_at(pairs, int(row)) for row in best[1:]),
        )
        self.cluster.reserve(request, dispatch, now)
        self._learning.sent(self.cluster.reservations[request.id])
        self.prefixes.dispatched(request, dispatch.estimate.prefill, dispatch.estimate.held_tokens, now=now)
        self._chooser.dispatched(request, dispatch, now=now)
        self._waiting.dispatched(request, dispatch.estimate.prefill_s, now=now)
        return dispatch

    def _candidate_pairs(self, request: Request, now: float) -> tuple[PairTable, Forecast]:
        """Pairs of engines that are up, have the model and room; those that failed this request only if no other."""
        loads = [
            state.load(now)
            for state in self.cluster.engines.values()
            if state.health is Health.UP
            and self.limits.serves(state.engine, request)
            and state.in_flight_count < self.limits.room(state.engine)
        ]
        pairs, forecast = self._estimate(request, loads, now)
        for engine_id in request.avoid:
            fresh = [load for load in loads if load.engine.id != engine_id]
            others, other_forecast = self._estimate(request, fresh, now)
            if len(others):
                loads, pairs, forecast = fresh, others, other_forecast
        return pairs, forecast

    def _estimate(self, request: Request, loads: list[EngineLoad], now: float) -> tuple[PairTable, Forecast]:
        cached_tokens = self.prefixes.cached_tokens(request, [load.engine for load in loads])
        decodes = [load for load in loads if load.engine.role is not Role.PREFILL]
        forecast = Forecast(self.cluster, decodes, self._lines, self._learning.law, now=now)
        pairs = estimate_pairs(
            request, loads, self._estimator, cached_tokens, forecast, offers_local=self._offers_local
        )
        if self._offers_local:
            margins, tokens = self._learning.margins, request.prompt_tokens
            broken = breaks_promise(
                request,
                pairs,
                forecast,
                prefill_margin=1.0 if margins is None else margins.factor(Role.PREFILL, tokens, STALL_QUANTILE),
                decode_margin=1.0 if margins is None else margins.factor(Role.DECODE, tokens, STALL_QUANTILE),
            )
            pairs = kept_rows(pairs, ~broken)
        return pairs, forecast

    # ---- between the legs -------------------------------------------------------------------------------------------

    def _hand_offs(self, now: float) -> list[Decision]:
        """Where those decode whose prefill is done, as far as there are places; and whom none came in time.

        In the order in which their prefills ended: were smaller ones let past, a long prompt would find no place before
        its first token is late, and the dearest of prefills would be thrown away.
        """
        self._between_at = None
        decisions: list[Decision] = []
        blocked: list[str] = []
        for request_id, patience in list(self._between.items()):
            reservation = self.cluster.reservations[request_id]
            if reservation.request.model in blocked:
                continue
            decision = self._hand_off(reservation, now)
            if isinstance(decision, Patience):
                if patience is None or patience.latest_at > now:
                    self._between[request_id] = decision if patience is None else patience
                    blocked.append(reservation.request.model)
                    continue
                decision = self._refuse_by_rule(reservation.request, patience.refusal, reservation.estimate, now)
            del self._between[request_id]
            if isinstance(decision, Reject):
                self.cluster.release(request_id, now)
            decisions.append(decision)
        return decisions

    def _hand_off(self, reservation: Reservation, now: float) -> HandOff | Reject | Patience:
        """The decode engine whose step will be the shortest, unless the admission rule has something against it."""
        request, estimate = reservation.request, reservation.estimate
        loads = [state.load(now) for state in self._takers(reservation)]
        if not loads:
            return self._refuse(request, RejectReason.NO_DECODE, "no decode engine is up", now)
        forecast = Forecast(self.cluster, loads, self._lines, self._learning.law, now=now)
        batch, kv_tokens = forecast.present(but=reservation.row)
        kv_tokens = kv_tokens + request.prompt_tokens
        tbt_s = forecast.step_s(batch + 1.0, kv_tokens)
        has_room = kv_tokens <= forecast.capacity_tokens
        best = int(np.argmin(np.where(has_room | ~has_room.any(), tbt_s, np.inf)))
        end = PrefillEnd(
            request=request,
            estimate=replace(estimate, decode=loads[best].engine.id, tbt_s=float(tbt_s[best])),
            cluster=self.cluster,
            estimator=self._estimator,
            ended_at=now if reservation.prefill_done_at is None else reservation.prefill_done_at,
            bound_s=float(forecast.tightest_s[best]),
            has_room=bool(has_room[best]),
            margins=self._learning.margins,
        )
        answer = self._gate.end_prefill(end, now=now)
        if isinstance(answer, Patience):
            return answer
        if isinstance(answer, Refusal):
            return self._refuse_by_rule(request, answer, end.estimate, now)
        self.cluster.hand_off(request.id, end.estimate.decode, now)
        return HandOff(request.id, end.estimate.decode, end.estimate.tbt_s)

    def _takers(self, reservation: Reservation) -> list[EngineState]:
        """The decode engines that could take the request over from its prefill engine, ascending by id."""
        estimate = reservation.estimate
        prefill = self.cluster.engines.get(estimate.prefill)
        return [
            state
            for state in self.cluster.engines.values()
            if may_decode(state.engine)
            and state.health is Health.UP
            and (prefill is None or state.engine.pool == prefill.engine.pool)
            and self.limits.serves(state.engine, reservation.request)
            and (state.engine.id == estimate.decode or state.in_flight_count < self.limits.room(state.engine))
        ]

    def _refuse(self, request: Request, reason: RejectReason, message: str, now: float) -> Reject:
        return Reject(request.id, reason, message, retry_after_s=self._retry_after_s(request, None, reason, now))

    def _refuse_by_rule(self, request: Request, refusal: Refusal, best: Estimate | None, now: float) -> Reject:
        return Reject(
            request.id,
            refusal.reason,
            refusal.message,
            retry_after_s=None
            if refusal.is_lasting
            else self._retry_after_s(request, best, refusal.reason, now, refusal.retry_after_s),
            best=best,
            predicted_s=refusal.predicted_s,
            bound_s=refusal.bound_s,
        )

    def _retry_after_s(
        self, request: Request, best: Estimate | None, reason: RejectReason, now: float, ready_s: float | None = None
    ) -> float:
        """When this very request is expected to be admitted, after those who were told so before it.

        A rule that knows says `ready_s`; else what is ahead of it is worked off, or as many places become free.
        """
        waiting = self._patience.values()
        interval_s = self._finishes.interval_s
        if best is not None and reason is not RejectReason.TBT_SLO:
            prefills = [
                state
                for state in self.cluster.engines.values()
                if state.engine.role is not Role.DECODE
                and state.health is Health.UP
                and self.limits.serves(state.engine, request)
            ]
            drained_s, slot_s = prefill_return_s(request, best, prefills, waiting, now=now)
        elif interval_s is None:
            # Nothing is known of the pace: those who may wait come back within the time they may.
            drained_s, slot_s = self.limits.max_wait_s, self.limits.max_wait_s / max(1, self.limits.max_waiting)
        elif reason is RejectReason.TBT_SLO:
            drained_s, slot_s = place_return_s(interval_s, waiting)
        else:
            drained_s, slot_s = (len(self._waiting) + 1) * interval_s, interval_s
        return self._returns.book(request, ready_s=drained_s if ready_s is None else ready_s, slot_s=slot_s, now=now)

    # ---- events -----------------------------------------------------------------------------------------------------

    def apply(self, event: Event, *, now: float) -> None:
        """Takes in what the world told. Events about requests or engines that are gone are ignored."""
        match event:
            case EngineFound(engine):
                self.cluster.found(engine)
                self.prefixes.found(engine)
                self._room_at = now
            case EngineLost(engine_id):
                self.cluster.lost(engine_id)
                self.prefixes.lost(engine_id)
                self._lines.lost(engine_id)
                self._room_at = now
            case EngineHealth(engine_id, health, reason):
                self.cluster.set_health(engine_id, health, reason)
                if health is Health.DOWN:
                    self.prefixes.restarted(engine_id)
                self._room_at = now
            case EngineReport(engine_id, report):
                self.cluster.reported(engine_id, report, now)
                if state := self.cluster.engines.get(engine_id):
                    self._estimator.observe_report(state.engine, report)
                self._room_at = now
            case PrefillDone(request_id, _, cached_tokens, awaits_decode):
                self.prefixes.prefilled(request_id, cached_tokens, now=now)
                self._prefill_done(request_id, now)
                self._after_prefill(request_id, awaits_decode, now)
            case FirstToken(request_id):
                self._first_token(request_id, now)
            case Progress(request_id, output_tokens):
                self.cluster.progressed(request_id, output_tokens, now)
            case Finished():
                self._finished(event, now)
            case AttemptFailed(request_id) | Left(request_id):
                self._forget_waiting(request_id)
                self._between.pop(request_id, None)
                self._stopped = [reject for reject in self._stopped if reject.request_id != request_id]
                self.prefixes.failed(request_id)
                self.cluster.release(request_id, now)
                self._room_at = now
            case BlocksStored() | BlocksRemoved() | BlocksCleared():
                self.prefixes.announced(event)
            case KvFeed(engine_id, state, rows):
                self.prefixes.feed_changed(engine_id, state, rows)
            case Joined(owner, turn_s):
                self.cluster.turns.join(owner, turn_s)
                self.cluster.set_turns()
                self._room_at = now
            case PeerSent() | PeerMoved() | PeerHolds() | PeerGone():
                if self.leases.apply(event, now=now):
                    self._room_at = now

    def _prefill_done(self, request_id: str, now: float) -> None:
        reservation = self.cluster.prefill_done(request_id, now)
        if reservation is not None:
            self._room_at = now
            self._learning.prefilled(reservation, self.cluster, now=now)

    def _after_prefill(self, request_id: str, awaits_decode: bool, now: float) -> None:
        """A shell that waits to be told where to decode is told by `wake`; the others decode as it was dispatched."""
        reservation = self.cluster.reservations.get(request_id)
        if reservation is None or reservation.handed_at is not None or request_id in self._between:
            return
        if awaits_decode and reservation.estimate.is_hand_off:
            self._between[request_id] = None
            self._between_at = now
        elif reservation.estimate.decode in self.cluster.engines:
            self.cluster.hand_off(request_id, reservation.estimate.decode, now)

    def _first_token(self, request_id: str, now: float) -> None:
        self._prefill_done(request_id, now)
        self._between.pop(request_id, None)
        self._after_prefill(request_id, False, now)
        reservation = self.cluster.progressed(request_id, 1, now)
        if reservation is not None:
            self._learning.began(reservation, self.cluster, now=now)

    def _finished(self, event: Finished, now: float) -> None:
        self.prefixes.prefilled(event.request_id, event.cached_tokens, now=now)
        self._between.pop(event.request_id, None)
        reservation = self.cluster.release(event.request_id, now)
        if reservation is None:
            return
        self._room_at = now
        if self._between:
            self._between_at = now
        self._finishes.tick(now)
        self._waiting.fairness.served(reservation.request.tenant, decode_service_s(reservation, event))
        self._learning.finished(reservation, self.cluster, event)


def decode_service_s(reservation: Reservation, finished: Finished) -> float:
    """Seconds of a decode engine that the request had to itself: its share of every step it was part of."""
    output_tokens = finished.output_tokens or reservation.output_tokens
    return output_tokens * reservation.estimate.tbt_s / max(1, reservation.batch)
