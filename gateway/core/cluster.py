"""The ledger: for each engine its last report and what we sent since, kept as whole numbers so that nothing drifts.

A request in flight holds one Reservation: on its prefill engine until the prefill ends, on its decode engine until the
answer ends. Sums over reservations are integers (tokens, microseconds) and are taken back exactly as they were added,
so they return to zero when the requests are gone; `Cluster.check` asserts it.

Load that others put on an engine is what its report shows beyond our own requests. A report lags: between the instant
the engine counted and the instant we read it, requests of ours may have ended. So a report is compared with the most
requests we had there since the report before, and errs towards "ours".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from gateway.core.decode_rows import DecodeRows
from gateway.core.interfaces import EngineLoad
from gateway.core.turns import IDLE_S, Turns
from gateway.core.types import Dispatch, Engine, Estimate, Health, Report, Request

MICROSECONDS = 1_000_000


@dataclass(slots=True)
class Reservation:
    """What one dispatched request holds, and where it is in its life."""

    request: Request
    estimate: Estimate
    sent_at: float
    prefill_us: int
    """Predicted prefill work."""
    uncached_tokens: int
    prefill_done_at: float | None = None
    prefill_busy_s: float | None = None
    """How long the prefill engine was at this prefill: from its dispatch or the end of the one before, to its end."""
    first_token_at: float | None = None
    output_tokens: int = 0
    batch: int = 0
    """Requests in the fullest batch that it met, itself included; before its decode, those sent to its engine."""
    batch_kv_tokens: int = 0
    stall_s: float = 0.0
    longest_stall_s: float = 0.0
    """When it has ended: what prefills on its decode engine were predicted to add to its steps, and to one at most."""
    handed_at: float | None = None
    """When its decode was sent on; until then it may still decode elsewhere."""
    ttft_factor: float | None = None
    tbt_factor: float | None = None
    """The margins that were in force when it was sent: what was predicted for it was promised times these."""
    row: int = -1
    """Its place among the decode rows; -1: it has none."""
    mark: int = 0
    """What it adds to the lot that says whose turn its prefill engine's next vacancy is."""

    @property
    def held_s(self) -> float:
        """How long it waited between its legs, seconds >= 0."""
        return (self.handed_at or 0.0) - (self.prefill_done_at or 0.0) if self.handed_at is not None else 0.0


@dataclass(slots=True)
class EngineState:
    """Everything known of one engine now."""

    engine: Engine
    number: int = 0
    """Its number among the decode rows, never used twice at a time."""
    health: Health = Health.UNKNOWN
    health_reason: str = "not probed yet"
    report: Report | None = None
    reported_at: float | None = None
    prefilling: dict[str, Reservation] = field(default_factory=dict)
    """By request id, in the order sent: the prefill queue as we know it."""
    decoding: dict[str, Reservation] = field(default_factory=dict)
    """By request id: every request that decodes here or will."""
    prefill_us: int = 0
    queued_tokens: int = 0
    kv_tokens: int = 0
    producing_count: int = 0
    """Of `decoding`, those that have produced a token."""
    others_count: int = 0
    """Requests of others, by the last report."""
    own_peak_count: int = 0
    """The most requests of ours at once since the last report."""
    head_since: float = 0.0
    """When the first of `prefilling` became the first."""
    prefill_ended_at: float = float("-inf")
    """When a prefill last ended here."""
    last_mark: int = 0
    """Of the last request whose prefill was here, once none is."""
    turns: Turns = field(default_factory=Turns)
    """Of all engines."""
    turn_s: float = 0.0
    """How long after its next vacancy this gateway's turn begins."""

    @property
    def own_count(self) -> int:
        """Requests of ours in flight here; one that does both stages here counts once."""
        if not self.prefilling:
            return len(self.decoding)
        if not self.decoding:
            return len(self.prefilling)
        return len(self.prefilling.keys() | self.decoding.keys())

    @property
    def in_flight_count(self) -> int:
        """Requests in flight here, ours and others'."""
        return self.own_count + self.others_count

    def prefill_work_s(self, now: float) -> float:
        """Predicted seconds until the prefills sent here so far are done; the running one counts down while it runs."""
        if not self.prefilling:
            return 0.0
        head = next(iter(self.prefilling.values()))
        running_s = max(0.0, now - max(self.head_since, head.sent_at))
        return self.prefill_us / MICROSECONDS - min(running_s, head.prefill_us / MICROSECONDS)

    def opens_s(self, queue_s: float, now: float) -> float:
        """Seconds until no more than `queue_s` of prefill work is ahead here; negative: since when that is so."""
        if self.prefilling:
            return self.prefill_work_s(now) - queue_s
        return self.prefill_ended_at - queue_s - now

    def turn_in_s(self, queue_s: float, now: float) -> float:
        """Seconds until the engine is open (`opens_s`) and this gateway's turn has come, >= 0."""
        opens_s = self.opens_s(queue_s, now)
        is_idle = -opens_s - queue_s > IDLE_S and not self.prefilling
        return self.turns.in_s(self.turn_s, opens_s, is_idle=is_idle, now=now)

    def load(self, now: float) -> EngineLoad:
        """The engine as policies and predictors see it."""
        return EngineLoad(
            engine=self.engine,
            report=self.report,
            report_age_s=None if self.reported_at is None else now - self.reported_at,
            in_flight_count=self.in_flight_count,
            queued_count=len(self.prefilling) + len(self.decoding) - self.producing_count,
            decoding_count=self.producing_count,
            prefill_work_s=self.prefill_work_s(now),
            queued_tokens=self.queued_tokens,
            kv_tokens=self.kv_tokens,
            own_count=self.own_count,
        )


def owner_of(request_id: str) -> str:
    """The gateway whose request has that name in the ledger; "" is this one. See core/leases.py."""
    return request_id.partition("@")[2].partition("#")[0]


class Cluster:
    """All engines and all reservations. Unknown ids are ignored: an end may be told twice, an engine may be gone."""

    def __init__(self) -> None:
        self.engines: dict[str, EngineState] = {}
        """Sorted by id, so that every walk over it is in the same order in every process."""
        self.reservations: dict[str, Reservation] = {}
        self.rows = DecodeRows()
        """Those of the reservations that decode on a known engine, or will."""
        self.number_count = 0
        """Engines are numbered below this."""
        self.turns = Turns()
        self._free_numbers: list[int] = []

    # ---- engines ----------------------------------------------------------------------------------------------------

    def found(self, engine: Engine) -> None:
        """Adds an engine, or replaces the facts about a known one and keeps its load."""
        if engine.id in self.engines:
            self.engines[engine.id].engine = engine
            return
        if not self._free_numbers:
            self._free_numbers.append(self.number_count)
            self.number_count += 1
        self.engines[engine.id] = EngineState(engine, self._free_numbers.pop(), turns=self.turns)
        self.engines = dict(sorted(self.engines.items()))

    def lost(self, engine_id: str) -> None:
        """Forgets an engine. Requests in flight there stay reserved elsewhere until the shell reports their end."""
        state = self.engines.pop(engine_id, None)
        if state is not None:
            self._free_numbers.append(state.number)
            for reservation in state.decoding.values():
                self.rows.remove(reservation)

    def set_health(self, engine_id: str, health: Health, reason: str) -> None:
        if state := self.engines.get(engine_id):
            state.health, state.health_reason = health, reason

    def reported(self, engine_id: str, report: Report, now: float) -> None:
        """Takes a report in; what it shows beyond our own requests is others' load."""
        if state := self.engines.get(engine_id):
            state.report, state.reported_at = report, now
            state.others_count = max(0, report.running_count + report.waiting_count - state.own_peak_count)
            state.own_peak_count = state.own_count

    def loads(self, now: float) -> Iterator[EngineLoad]:
        return (state.load(now) for state in self.engines.values())

    # ---- requests ---------------------------------------------------------------------------------------------------

    def reserve(self, request: Request, dispatch: Dispatch, now: float) -> None:
        """Books a dispatched request on both its engines. The request must not be in flight already."""
        assert request.id not in self.reservations, f"request {request.id} is dispatched twice"
        estimate = dispatch.estimate
        reservation = Reservation(
            request=request,
            estimate=estimate,
            sent_at=now,
            prefill_us=round(estimate.prefill_s * MICROSECONDS),
            uncached_tokens=max(0, request.prompt_tokens - estimate.cached_tokens),
        )
        self.reservations[request.id] = reservation
        if prefill := self.engines.get(estimate.prefill):
            if not prefill.prefilling:
                prefill.head_since = now
            prefill.prefilling[request.id] = reservation
            reservation.mark = self.turns.mark(owner_of(request.id), request.prompt_tokens)
            self._set_turn(prefill)
            prefill.prefill_us += reservation.prefill_us
            prefill.queued_tokens += reservation.uncached_tokens
            prefill.own_peak_count = max(prefill.own_peak_count, prefill.own_count)
        if decode := self.engines.get(estimate.decode):
            decode.decoding[request.id] = reservation
            decode.kv_tokens += request.prompt_tokens
            decode.own_peak_count = max(decode.own_peak_count, decode.own_count)
            reservation.batch, reservation.batch_kv_tokens = len(decode.decoding), decode.kv_tokens
            if estimate.prefill == estimate.decode and estimate.stall_s > 0.0:
                self.rows.stall(decode.number, estimate.prefill_s, estimate.stall_s)
            self._add_row(reservation, decode, now)

    def prefill_done(self, request_id: str, now: float) -> Reservation | None:
        """Releases the prefill half. Returns the reservation the first time, None when there is nothing to release."""
        reservation = self.reservations.get(request_id)
        if reservation is None or reservation.prefill_done_at is not None:
            return None
        reservation.prefill_done_at = now
        if prefill := self.engines.get(reservation.estimate.prefill):
            reservation.prefill_busy_s = now - max(reservation.sent_at, prefill.prefill_ended_at)
        self._release_prefill(reservation, now)
        if reservation.row >= 0:
            self.rows.begins_at[reservation.row] = now
        return reservation

    def hand_off(self, request_id: str, decode_id: str, now: float) -> None:
        """Books that the decode begins, on that engine. The request must be in flight and the engine known."""
        reservation = self.reservations[request_id]
        if reservation.estimate.decode != decode_id:
            self._move(reservation, decode_id, now)
        reservation.handed_at = now
        if reservation.row >= 0:
            self.rows.begin(reservation.row, self.engines[decode_id].number, now)

    def _move(self, reservation: Reservation, decode_id: str, now: float) -> None:
        request_id, tokens = reservation.request.id, reservation.request.prompt_tokens + reservation.output_tokens
        old, new = self.engines.get(reservation.estimate.decode), self.engines[decode_id]
        if old and old.decoding.pop(request_id, None):
            old.kv_tokens -= tokens
            old.producing_count -= reservation.first_token_at is not None
        reservation.estimate = replace(reservation.estimate, decode=decode_id)
        new.decoding[request_id] = reservation
        new.kv_tokens += tokens
        new.producing_count += reservation.first_token_at is not None
        new.own_peak_count = max(new.own_peak_count, new.own_count)
        reservation.batch, reservation.batch_kv_tokens = len(new.decoding), new.kv_tokens
        if reservation.row < 0:
            self._add_row(reservation, new, now)

    def _add_row(self, reservation: Reservation, decode: EngineState, now: float) -> None:
        request, estimate = reservation.request, reservation.estimate
        self.rows.add(
            reservation,
            decode.number,
            (request.model,),
            prompt_tokens=request.prompt_tokens,
            begins_at=now + estimate.wait_s + estimate.fetch_s + estimate.prefill_s,
            bound_s=float("inf") if request.slo.step_s is None else request.slo.step_s,
        )

    def progressed(self, request_id: str, output_tokens: int, now: float) -> Reservation | None:
        """Records that the request has that many output tokens. Returns the reservation at its first token."""
        reservation = self.reservations.get(request_id)
        if reservation is None:
            return None
        decode = self.engines.get(reservation.estimate.decode)
        if decode and request_id not in decode.decoding:
            decode = None
        is_first = reservation.first_token_at is None
        if is_first:
            reservation.first_token_at = now
        grown = max(0, output_tokens - reservation.output_tokens)
        reservation.output_tokens += grown
        if decode:
            decode.kv_tokens += grown
            decode.producing_count += is_first
        if reservation.row >= 0:
            self.rows.tell(reservation.row, reservation.output_tokens, now)
        return reservation if is_first else None

    def release(self, request_id: str, now: float) -> Reservation | None:
        """Gives back all that the request holds. Returns its reservation, None when it held nothing."""
        reservation = self.reservations.pop(request_id, None)
        if reservation is None:
            return None
        self._release_prefill(reservation, now)
        decode = self.engines.get(reservation.estimate.decode)
        if decode and decode.decoding.pop(request_id, None):
            decode.kv_tokens -= reservation.request.prompt_tokens + reservation.output_tokens
            decode.producing_count -= reservation.first_token_at is not None
        if reservation.row >= 0:
            peak_batch = int(self.rows.peak_batch[reservation.row])
            if peak_batch:
                reservation.batch, reservation.batch_kv_tokens = peak_batch, int(self.rows.peak_tokens[reservation.row])
            reservation.stall_s = float(self.rows.stall_s[reservation.row])
            reservation.longest_stall_s = float(self.rows.longest_stall_s[reservation.row])
            self.rows.remove(reservation)
        return reservation

    def _release_prefill(self, reservation: Reservation, now: float) -> None:
        request_id = reservation.request.id
        prefill = self.engines.get(reservation.estimate.prefill)
        if prefill is None or request_id not in prefill.prefilling:
            return
        prefill.prefill_ended_at = now
        if next(iter(prefill.prefilling)) == request_id:
            prefill.head_since = now
        del prefill.prefilling[request_id]
        if not prefill.prefilling:
            prefill.last_mark = reservation.mark
        self._set_turn(prefill)
        prefill.prefill_us -= reservation.prefill_us
        prefill.queued_tokens -= reservation.uncached_tokens

    # ---- turns ------------------------------------------------------------------------------------------------------

    def share_with(self, others: Iterable[str]) -> None:
        """Learns which other gateways there are."""
        if self.turns.found(others):
            self.set_turns()

    def set_turns(self) -> None:
        """Says anew of every engine whose turn its next vacancy is."""
        for state in self.engines.values():
            self._set_turn(state)

    def _set_turn(self, prefill: EngineState) -> None:
        if not self.turns.round_s:
            prefill.turn_s = 0.0
            return
        marks = sum(each.mark for each in prefill.prefilling.values()) if prefill.prefilling else prefill.last_mark
        prefill.turn_s = self.turns.delay_s(prefill.engine.id, marks)

    def check(self) -> None:
        """Asserts that the sums equal what the reservations hold: whole numbers, so exactly."""
        for state in self.engines.values():
            prefilling, decoding = state.prefilling.values(), state.decoding.values()
            assert state.prefill_us == sum(r.prefill_us for r in prefilling)
            assert state.queued_tokens == sum(r.uncached_tokens for r in prefilling)
            assert state.kv_tokens == sum(r.request.prompt_tokens + r.output_tokens for r in decoding)
            assert state.producing_count == sum(r.first_token_at is not None for r in decoding)
            assert (state.prefilling.keys() | state.decoding.keys()) <= self.reservations.keys()
            assert sum(self.rows.engine[: len(self.rows)] == state.number) == len(decoding)
        assert len(self.rows) == sum(len(state.decoding) for state in self.engines.values())
