"""The one door of the core: a prefill and a decode engine for each request, a wait, or a refusal at once.

Gather, decide, act: by the time `decide` is called everything needed is an argument or already in the ledger; what it
returns is booked before it returns. Nothing here awaits, logs, or looks at a clock. The live driver and the simulator
make the same calls, and a journal of them fed back gives the same decisions.
"""

from __future__ import annotations

import random

import numpy as np

from gateway.core.admission import AdmissionLimits, AdmitAll, refuse_unservable
from gateway.core.cluster import Cluster, Reservation
from gateway.core.estimate import estimate_at, estimate_pairs
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
    KvFeed,
    Left,
    PrefillDone,
    Progress,
)
from gateway.core.interfaces import (
    Admission,
    Arrival,
    DecodeOutcome,
    EngineLoad,
    HandOffOutcome,
    PairTable,
    Policy,
    Predictor,
    PrefillEnd,
    PrefillOutcome,
    Refusal,
)
from gateway.core.pace import Pace
from gateway.core.prefixes import Prefixes
from gateway.core.types import (
    Decision,
    Dispatch,
    Estimate,
    Health,
    Reject,
    RejectReason,
    Request,
    Wait,
    WaitReason,
)
from gateway.core.waiting import WaitingQueue

RUNNERS_UP = 3


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
    ) -> None:
        """Nothing known yet. `max_blocks` >= 1 bounds the prefix index (31 bytes each, taken at once).

        Without an admission rule nobody is refused whom an engine could serve at all.
        """
        self.cluster = Cluster()
        self.prefixes = Prefixes(max_blocks=max_blocks, max_age_s=limits.observed_age_s)
        self.limits = limits
        self._chooser = policy.start(rng)
        self._estimator = predictor.start()
        self._gate = (admission or AdmitAll()).start()
        self._waiting = WaitingQueue(limits.max_waiting)
        self._finishes = Pace()
        self._room_at: float | None = None
        """When room may have appeared for a waiting request; None: not since the last `wake`."""
        self._stopped: list[Reject] = []
        """Requests refused after their prefill, for `wake` to name."""
        self._stopped_at = 0.0

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """The KV block sizes in use, in tokens, ascending: the sizes at which prompts are to be hashed."""
        sizes = {state.engine.block_tokens for state in self.cluster.engines.values()}
        return tuple(sorted(size for size in sizes if size is not None))

    @property
    def waiting_count(self) -> int:
        """Requests waiting in the gateway."""
        return len(self._waiting)

    # ---- decisions --------------------------------------------------------------------------------------------------

    def decide(self, request: Request, *, now: float) -> Decision:
        """Dispatch, Wait or Reject for this request, already booked. A retry is the same request with `attempt` + 1."""
        assert request.id not in self._waiting, f"request {request.id} is decided while it waits"
        return self._decide(request, now)

    def wake(self, *, now: float) -> list[Decision]:
        """New decisions for requests that waited: refusals of those whose time is over, dispatches of those with room.

        Requests that go on waiting are not named again. A refusal may also name a request whose prefill just ended.
        """
        self._room_at = None
        decisions: list[Decision] = [*self._stopped]
        self._stopped.clear()
        decisions += [
            self._refuse(
                request,
                RejectReason.WAITED_TOO_LONG,
                f"no engine had room within {self.limits.max_wait_s:g} s",
            )
            for request in self._waiting.remove_ended(now)
        ]
        full_models: list[tuple[str, bool]] = []
        for request in self._waiting:
            group = request.model, request.can_hand_off
            if group in full_models:
                continue
            decision = self._try(request, now)
            if decision is None:
                full_models.append(group)
                continue
            self._waiting.remove(request.id)
            decisions.append(decision)
        return decisions

    def next_wakeup(self) -> float | None:
        """When `wake` has something to do; None when nobody waits. An instant in the past means now."""
        if self._stopped:
            return self._stopped_at
        if not self._waiting:
            return None
        end_at = self._waiting.next_end_at()
        if self._room_at is None or end_at is None:
            return end_at
        return min(self._room_at, end_at)

    def _decide(self, request: Request, now: float) -> Decision:
        decision = self._try(request, now)
        if decision is not None:
            return decision
        if self._waiting.is_full:
            return self._refuse(request, RejectReason.QUEUE_FULL, f"{len(self._waiting)} requests wait already")
        until_at = request.arrived_at + self.limits.max_wait_s
        if until_at <= now:
            return self._refuse(request, RejectReason.WAITED_TOO_LONG, "its time to wait is over")
        if not self._waiting:
            self._room_at = None  # what changed before was seen by this very attempt
        self._waiting.add(request, until_at)
        return Wait(request.id, WaitReason.ENGINES_FULL, until_at)

    def _try(self, request: Request, now: float) -> Decision | None:
        """A dispatch or a refusal now; None when engines exist and all of them are full."""
        refusal = refuse_unservable(request, self.cluster, self.limits)
        if refusal is not None:
            return refusal
        pairs = self._candidate_pairs(request, now)
        if len(pairs) == 0:
            return None
        costs = self._chooser.costs(request, pairs, now=now)
        arrival = Arrival(request, pairs, costs, self.cluster, self._estimator)
        allowed = self._gate.arrive(arrival, now=now)
        if isinstance(allowed, Refusal):
            return self._refuse_by_rule(request, allowed, estimate_at(pairs, arrival.chosen_row))
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
        self.prefixes.dispatched(request, dispatch.estimate.prefill, dispatch.estimate.held_tokens, now=now)
        self._chooser.dispatched(request, dispatch, now=now)
        return dispatch

    def _candidate_pairs(self, request: Request, now: float) -> PairTable:
        """Pairs of engines that are up, have the model and room; those that failed this request only if no other."""
        loads = [
            state.load(now)
            for state in self.cluster.engines.values()
            if state.health is Health.UP
            and self.limits.serves(state.engine, request)
            and state.in_flight_count < self.limits.room(state.engine)
        ]
        fresh = [load for load in loads if load.engine.id not in request.avoid]
        pairs = self._estimate(request, fresh, now)
        if len(pairs) == 0 and len(fresh) < len(loads):
            pairs = self._estimate(request, loads, now)
        return pairs

    def _estimate(self, request: Request, loads: list[EngineLoad], now: float) -> PairTable:
        cached_tokens = self.prefixes.cached_tokens(request, [load.engine for load in loads])
        return estimate_pairs(request, loads, self._estimator, cached_tokens)

    def _refuse(self, request: Request, reason: RejectReason, message: str) -> Reject:
        return Reject(request.id, reason, message, retry_after_s=self._retry_after_s())

    def _refuse_by_rule(self, request: Request, refusal: Refusal, best: Estimate) -> Reject:
        retry_after_s = self._retry_after_s() if refusal.retry_after_s is None else refusal.retry_after_s
        return Reject(request.id, refusal.reason, refusal.message, retry_after_s=retry_after_s, best=best)

    def _retry_after_s(self) -> float:
        """When a place is expected: those who wait go first, at the pace at which requests finish."""
        interval_s = self._finishes.interval_s
        if interval_s is None:
            return self.limits.max_wait_s
        return (len(self._waiting) + 1) * interval_s

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
                self._room_at = now
            case EngineHealth(engine_id, health, reason):
                self.cluster.set_health(engine_id, health, reason)
                if health is Health.DOWN:
                    self.prefixes.restarted(engine_id)
                self._room_at = now
            case EngineReport(engine_id, report):
                self.cluster.reported(engine_id, report, now)
                self._room_at = now
            case PrefillDone(request_id, _, cached_tokens):
                self.prefixes.prefilled(request_id, cached_tokens, now=now)
                self._prefill_done(request_id, now)
                self._ask_before_decode(request_id, now)
            case FirstToken(request_id):
                self._first_token(request_id, now)
            case Progress(request_id, output_tokens):
                self.cluster.progressed(request_id, output_tokens, now)
            case Finished():
                self._finished(event, now)
            case AttemptFailed(request_id) | Left(request_id):
                self._waiting.remove(request_id)
                self.prefixes.failed(request_id)
                self.cluster.release(request_id, now)
                self._room_at = now
            case BlocksStored() | BlocksRemoved() | BlocksCleared():
                self.prefixes.announced(event)
            case KvFeed(engine_id, state, rows):
                self.prefixes.feed_changed(engine_id, state, rows)

    def _prefill_done(self, request_id: str, now: float) -> None:
        reservation = self.cluster.prefill_done(request_id, now)
        if reservation is not None:
            self._room_at = now
            self._learn_prefill(reservation, now)

    def _ask_before_decode(self, request_id: str, now: float) -> None:
        """Stops the request between its legs when the admission rule says so."""
        reservation = self.cluster.reservations.get(request_id)
        if reservation is None or not reservation.estimate.is_hand_off:
            return
        request, estimate = reservation.request, reservation.estimate
        refusal = self._gate.end_prefill(PrefillEnd(request, estimate, self.cluster, self._estimator), now=now)
        if refusal is not None:
            self.cluster.release(request_id, now)
            self._stopped.append(self._refuse_by_rule(request, refusal, estimate))
            self._stopped_at = now

    def _first_token(self, request_id: str, now: float) -> None:
        self._prefill_done(request_id, now)
        reservation = self.cluster.progressed(request_id, 1, now)
        if reservation is not None and reservation.estimate.is_hand_off:
            self._learn_hand_off(reservation, now)

    def _finished(self, event: Finished, now: float) -> None:
        self.prefixes.prefilled(event.request_id, event.cached_tokens, now=now)
        reservation = self.cluster.release(event.request_id, now)
        if reservation is None:
            return
        self._room_at = now
        self._finishes.tick(now)
        if event.tbt_s is not None:
            self._learn_decode(reservation, event)

    def _learn_prefill(self, reservation: Reservation, now: float) -> None:
        estimate = reservation.estimate
        state = self.cluster.engines.get(estimate.prefill)
        if state is not None:
            self._estimator.observe_prefill(
                PrefillOutcome(
                    engine=state.engine,
                    prompt_tokens=reservation.request.prompt_tokens,
                    cached_tokens=estimate.cached_tokens,
                    queued_ahead_s=estimate.wait_s,
                    elapsed_s=now - reservation.sent_at,
                    busy_s=reservation.prefill_busy_s,
                    predicted_s=estimate.wait_s + estimate.prefill_s,
                )
            )

    def _learn_hand_off(self, reservation: Reservation, now: float) -> None:
        estimate = reservation.estimate
        prefill, decode = self.cluster.engines.get(estimate.prefill), self.cluster.engines.get(estimate.decode)
        if prefill is None or decode is None or reservation.prefill_done_at is None:
            return
        # What is seen holds the join too. Both get their predicted share: taking the predicted join off instead would
        # leave nothing, and nothing to learn, whenever the join was predicted too long.
        predicted_s = estimate.hand_off_s + estimate.join_s
        share = estimate.hand_off_s / predicted_s if predicted_s > 0 else 1.0
        self._estimator.observe_hand_off(
            HandOffOutcome(
                prefill=prefill.engine,
                decode=decode.engine,
                prompt_tokens=reservation.request.prompt_tokens,
                elapsed_s=share * (now - reservation.prefill_done_at),
            )
        )

    def _learn_decode(self, reservation: Reservation, event: Finished) -> None:
        state = self.cluster.engines.get(reservation.estimate.decode)
        if state is not None and event.tbt_s is not None:
            self._estimator.observe_decode(
                DecodeOutcome(
                    engine=state.engine,
                    batch=reservation.batch,
                    kv_tokens=reservation.batch_kv_tokens,
                    output_tokens=event.output_tokens or reservation.output_tokens,
                    tbt_s=event.tbt_s,
                    predicted_tbt_s=reservation.estimate.tbt_s,
                )
            )
