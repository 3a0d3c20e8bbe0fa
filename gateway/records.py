"""One record per request: everything an operator asks of it afterwards, and one hook for all who want to know.

The recorder listens where the journal listens (events and decisions pass through the driver, nothing per token does)
and gathers what concerns one request in its trail. When the request is over the trail becomes a `RequestRecord`, which
never changes again: it goes into a bounded ring and to every observer (spans, metrics, the log line, the live page).
Sizes, times, names and numbers only: no prompt text is ever in a record, but for `prompt`, which stays empty unless the
operator switched it on for spans.
"""

from __future__ import annotations

import random
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum

import structlog

from gateway.core.candidates import Candidates
from gateway.core.events import AttemptFailed, Event, Finished, FirstToken, Left, PrefillDone
from gateway.core.types import Decision, Dispatch, Estimate, Reject, Request, Slo
from gateway.trace_context import Ids, Parent, Trace, parse

KEPT_CANDIDATES = 16
"""Pairs kept of each decision: what a person reads; the best three of them are on the span."""

log = structlog.get_logger("sluice.records")


class Outcome(StrEnum):
    """How a request ended. The string is the metric label, the filter of the decisions route and the log's word."""

    SERVED = "served"
    REFUSED = "refused"
    """By the core: `reason` says which bound broke."""
    BROKEN = "broken"
    """The answer ended with an error event after it had begun."""
    CLIENT_LEFT = "client_left"
    BAD_REQUEST = "bad_request"
    """It was not sound, and no engine was asked."""
    ERROR = "error"
    """The gateway failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One decision and what came of it. Instants are on the driver's clock."""

    number: int
    decided_at: float
    decision_s: float
    """Time spent deciding, without the wait."""
    sent_at: float | None
    """When it was dispatched; later than `decided_at` by the wait in the gateway. None: it never was."""
    estimate: Estimate | None
    """The chosen pair's; of a refusal the best pair's, when there was one."""
    candidates: Candidates | None
    prefilled_at: float | None
    first_token_at: float | None
    ended_at: float | None
    reported_prompt_tokens: int | None
    reported_cached_tokens: int | None
    failure: str | None
    engine_at_fault: str | None
    prefill_span_id: int
    decode_span_id: int

    @property
    def is_hand_off(self) -> bool:
        """Whether it was sent to two engines."""
        return self.sent_at is not None and self.estimate is not None and self.estimate.is_hand_off

    @property
    def has_waited(self) -> bool:
        """Whether it waited in the gateway before it was sent."""
        return self.sent_at is not None and self.sent_at > self.decided_at


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """One request that is over."""

    id: str
    """Ours: what engines and the journal know it by."""
    client_id: str
    """The client's own `x-request-id` where it gave a sound one; else ours."""
    path: str
    model: str | None
    tenant: str
    slo: Slo
    is_stream: bool
    prompt_tokens: int | None
    is_prompt_exact: bool
    max_output_tokens: int | None
    arrived_at: float
    gathered_at: float | None
    """When all that the decision needs was known; None: it never was."""
    ended_at: float
    unix_offset_s: float
    """Added to an instant it gives Unix time."""
    attempts: tuple[Attempt, ...]
    outcome: Outcome
    reason: str
    """Of a refusal its `RejectReason`, of a failure its cause in a few words; empty when it was served."""
    message: str
    """What a refused client was told."""
    retry_after_s: float | None
    status: int | None
    """Of the HTTP answer; None when there was none."""
    output_tokens: int | None
    tbt_s: float | None
    """Mean of the slowest 10 % of token gaps."""
    trace: Trace | None
    prompt: str | None = field(default=None, repr=False)
    """JSON of the messages, only where the operator wants it on spans."""

    @property
    def last(self) -> Attempt | None:
        """The attempt that decided its end."""
        return self.attempts[-1] if self.attempts else None

    @property
    def estimate(self) -> Estimate | None:
        """The prediction for the pair it went to in the end, or for the best one when it was refused."""
        return self.last.estimate if self.last else None

    @property
    def wait_s(self) -> float:
        """Seconds it waited in the gateway for a place, over all attempts."""
        ends = [(each.sent_at or each.ended_at or self.ended_at) - each.decided_at for each in self.attempts]
        return sum(ends) if ends else 0.0

    @property
    def ttft_s(self) -> float | None:
        """Seconds from its arrival to its first token; None when none was relayed."""
        is_there = self.last is not None and self.last.first_token_at is not None
        return self.last.first_token_at - self.arrived_at if is_there else None  # type: ignore[union-attr, operator]

    @property
    def predicted_ttft_s(self) -> float | None:
        """The same as it was predicted at its last decision: what had passed by then is known and not predicted."""
        if self.last is None or self.last.estimate is None:
            return None
        known_until = self.last.decided_at if self.last.sent_at is None else self.last.sent_at
        return known_until - self.arrived_at + self.last.estimate.ttft_s

    @property
    def predicted_tbt_s(self) -> float | None:
        """Predicted seconds between tokens."""
        return None if self.estimate is None else self.estimate.tbt_s

    @property
    def ttft_headroom_s(self) -> float | None:
        """Its bound less the prediction, seconds; below 0: it was predicted to miss. None without a bound."""
        return _less(self.slo.ttft_s, self.predicted_ttft_s)

    @property
    def tbt_headroom_s(self) -> float | None:
        """The same for token gaps: the tighter of TBT and TPOT."""
        return _less(self.slo.step_s, self.predicted_tbt_s)

    @property
    def cached_tokens(self) -> tuple[int, int] | None:
        """Prompt tokens believed to be cached, and those the engine reported; None when it did not say."""
        last = self.last
        if last is None or last.estimate is None or last.reported_cached_tokens is None or last.sent_at is None:
            return None
        return last.estimate.cached_tokens, last.reported_cached_tokens

    def unix_s(self, at: float) -> float:
        """An instant of this record as Unix time."""
        return at + self.unix_offset_s


def _less(bound_s: float | None, predicted_s: float | None) -> float | None:
    return None if bound_s is None or predicted_s is None else bound_s - predicted_s


# ---- while it runs ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Trying:
    """An attempt under way."""

    number: int
    decided_at: float
    decision_s: float
    sent_at: float | None = None
    estimate: Estimate | None = None
    candidates: Candidates | None = None
    prefilled_at: float | None = None
    first_token_at: float | None = None
    ended_at: float | None = None
    reported_prompt_tokens: int | None = None
    reported_cached_tokens: int | None = None
    failure: str | None = None
    engine_at_fault: str | None = None
    prefill_span_id: int = 0
    decode_span_id: int = 0

    def done(self) -> Attempt:
        return Attempt(
            number=self.number,
            decided_at=self.decided_at,
            decision_s=self.decision_s,
            sent_at=self.sent_at,
            estimate=self.estimate,
            candidates=self.candidates,
            prefilled_at=self.prefilled_at,
            first_token_at=self.first_token_at,
            ended_at=self.ended_at,
            reported_prompt_tokens=self.reported_prompt_tokens,
            reported_cached_tokens=self.reported_cached_tokens,
            failure=self.failure,
            engine_at_fault=self.engine_at_fault,
            prefill_span_id=self.prefill_span_id,
            decode_span_id=self.decode_span_id,
        )


class Trail:
    """What is known so far of one request."""

    __slots__ = (
        "arrived_at",
        "client_id",
        "finished",
        "gathered_at",
        "id",
        "is_stream",
        "model",
        "path",
        "prompt",
        "reject",
        "request",
        "slo",
        "tenant",
        "trace",
        "tries",
    )

    def __init__(self, request_id: str, client_id: str, path: str, arrived_at: float, trace: Trace | None) -> None:
        self.id = request_id
        self.client_id = client_id
        self.path = path
        self.arrived_at = arrived_at
        self.trace = trace
        self.model: str | None = None
        self.tenant = "default"
        self.slo = Slo()
        self.is_stream = False
        self.prompt: str | None = None
        self.request: Request | None = None
        self.gathered_at: float | None = None
        self.tries: list[_Trying] = []
        self.reject: Reject | None = None
        self.finished: Finished | None = None

    def gathered(self, request: Request, *, now: float) -> None:
        """All that the decision needs is known."""
        self.request, self.gathered_at = request, now
        self.tenant, self.slo = request.tenant, request.slo

    def leg_span_id(self, leg: str) -> int:
        """The span of that leg of the attempt under way: the caller that its engine is told."""
        trying = self.tries[-1]
        return trying.prefill_span_id if leg == "prefill" else trying.decode_span_id

    def done(self, *, outcome: Outcome, reason: str, status: int | None, now: float, unix_now: float) -> RequestRecord:
        """The record, now that it is over."""
        request, reject, finished = self.request, self.reject, self.finished
        is_refused = outcome is Outcome.REFUSED and reject is not None
        # The loop's clock stands still within one turn of it: a refusal would end before its decision did.
        now = max(now, *(trying.decided_at + trying.decision_s for trying in self.tries), now)
        return RequestRecord(
            id=self.id,
            client_id=self.client_id,
            path=self.path,
            model=self.model,
            tenant=self.tenant,
            slo=self.slo,
            is_stream=self.is_stream,
            prompt_tokens=request.prompt_tokens if request else None,
            is_prompt_exact=request.is_prompt_exact if request else False,
            max_output_tokens=request.max_output_tokens if request else None,
            arrived_at=self.arrived_at,
            gathered_at=self.gathered_at,
            ended_at=now,
            unix_offset_s=unix_now - now,
            attempts=tuple([trying.done() for trying in self.tries]),
            outcome=outcome,
            reason=reason,
            message=reject.message if is_refused and reject else "",
            retry_after_s=reject.retry_after_s if is_refused and reject else None,
            status=status,
            output_tokens=finished.output_tokens if finished else None,
            tbt_s=finished.tbt_s if finished else None,
            trace=self.trace,
            prompt=self.prompt,
        )


Observer = Callable[[RequestRecord], None]


class Recorder:
    """Follows every request and keeps the last `kept_count` records. All on the event loop: nothing here waits."""

    def __init__(
        self,
        *,
        kept_count: int,
        ids: Ids | None = None,
        rng: random.Random | None = None,
        unix_clock: Callable[[], float] = time.time,
        keeps_prompts: bool = False,
    ) -> None:
        """`kept_count` >= 1. Without `ids` there are no traces of ours: a caller's is noted and passed on untouched."""
        self.kept_count = kept_count
        self.keeps_prompts = keeps_prompts
        self.observers: list[Observer] = []
        self._traces = ids
        self._names = ids or Ids(sample_ratio=0.0, rng=rng or random.Random())
        self._unix_clock = unix_clock
        self._open: dict[str, Trail] = {}
        self._kept: OrderedDict[str, RequestRecord] = OrderedDict()
        self._by_client_id: dict[str, str] = {}

    @property
    def open_count(self) -> int:
        """Requests that are not over."""
        return len(self._open)

    @property
    def has_traces(self) -> bool:
        """Whether engines are told spans of ours as their callers."""
        return self._traces is not None

    # ---- told by the handlers ---------------------------------------------------------------------------------------

    def begin(
        self, request_id: str, client_id: str, path: str, headers: Iterable[tuple[str, str]], *, now: float
    ) -> Trail:
        """A request came in."""
        trail = Trail(request_id, client_id, path, now, self._trace(parse(headers)))
        self._open[request_id] = trail
        return trail

    def finish(self, trail: Trail, *, outcome: Outcome, reason: str, status: int | None, now: float) -> RequestRecord:
        """It is over: keeps its record and tells every observer. One that fails is left out, and said."""
        self._open.pop(trail.id, None)
        record = trail.done(outcome=outcome, reason=reason, status=status, now=now, unix_now=self._unix_clock())
        self._keep(record)
        for observe in self.observers:
            try:
                observe(record)
            except Exception:
                log.exception("an observer failed", request_id=record.id)
        return record

    # ---- told by the driver -----------------------------------------------------------------------------------------

    def decided(
        self, decision: Decision, candidates: Candidates | None, *, attempt: int, decision_s: float, now: float
    ) -> None:
        """A request was decided on arrival or retry."""
        trail = self._open.get(decision.request_id)
        if trail is not None:
            trail.tries.append(_Trying(attempt, now, decision_s))
            self._settle(trail, decision, candidates, now)

    def woke(self, decisions: Iterable[Decision], candidates: dict[str, Candidates], *, now: float) -> None:
        """Requests that waited were decided."""
        for decision in decisions:
            trail = self._open.get(decision.request_id)
            if trail is not None and trail.tries:
                self._settle(trail, decision, candidates.get(decision.request_id), now)

    def event(self, event: Event, *, now: float) -> None:
        """The world told something; what is not about a request that is followed here is ignored."""
        if not isinstance(event, PrefillDone | FirstToken | Finished | AttemptFailed | Left):
            return
        trail = self._open.get(event.request_id)
        if trail is not None and trail.tries:
            _take(trail, trail.tries[-1], event, now)

    # ---- afterwards -------------------------------------------------------------------------------------------------

    def find(self, request_id: str) -> RequestRecord | None:
        """The record of that request, by our id or the client's (the latest of those that share it)."""
        return self._kept.get(request_id) or self._kept.get(self._by_client_id.get(request_id, ""))

    def latest(self) -> Iterator[RequestRecord]:
        """The kept records, the youngest first."""
        return reversed(self._kept.values())

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _trace(self, parent: Parent | None) -> Trace | None:
        if self._traces is not None:
            return self._traces.trace(parent)
        return None if parent is None else Trace(parent.trace_id, parent.span_id, is_sampled=False, parent=parent)

    def _settle(self, trail: Trail, decision: Decision, candidates: Candidates | None, now: float) -> None:
        trying = trail.tries[-1]
        trying.candidates = candidates or trying.candidates
        if isinstance(decision, Dispatch):
            trying.sent_at, trying.estimate = now, decision.estimate
            if trail.trace is not None and trail.trace.is_sampled:
                trying.prefill_span_id, trying.decode_span_id = self._names.span_id(), self._names.span_id()
            else:  # nobody will see these spans: the request's own id stands for all of them
                trying.prefill_span_id = trying.decode_span_id = trail.trace.span_id if trail.trace else 0
        elif isinstance(decision, Reject):
            trail.reject = decision
            trying.ended_at, trying.estimate = now, decision.best or trying.estimate

    def _keep(self, record: RequestRecord) -> None:
        if len(self._kept) >= self.kept_count:
            _, oldest = self._kept.popitem(last=False)
            if self._by_client_id.get(oldest.client_id) == oldest.id:
                del self._by_client_id[oldest.client_id]
        self._kept[record.id] = record
        self._by_client_id[record.client_id] = record.id


def _take(trail: Trail, trying: _Trying, event: Event, now: float) -> None:
    """Writes an event down in the attempt it belongs to."""
    match event:
        case PrefillDone(_, prompt_tokens, cached_tokens):
            trying.prefilled_at = now
            trying.reported_prompt_tokens, trying.reported_cached_tokens = prompt_tokens, cached_tokens
        case FirstToken():
            trying.first_token_at = now
        case Finished():
            trail.finished, trying.ended_at = event, now
            if trying.reported_prompt_tokens is None:
                trying.reported_prompt_tokens = event.prompt_tokens
            if trying.reported_cached_tokens is None:
                trying.reported_cached_tokens = event.cached_tokens
        case AttemptFailed(_, engine_id, reason):
            trying.ended_at, trying.failure, trying.engine_at_fault = now, reason, engine_id
        case Left():
            trying.ended_at = now if trying.ended_at is None else trying.ended_at
