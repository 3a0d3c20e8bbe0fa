"""OpenTelemetry: finished records become span trees and go to a collector, off the event loop and never in its way.

Nothing of OpenTelemetry runs while a request does: its ids are numbers (gateway/trace_context.py), and its spans are
made of its record afterwards, in the exporting thread, with the instants that were noted. What the loop pays is one
`append` to a bounded queue for each sampled request. A collector that is away, slow or refusing therefore costs spans,
which are counted, and nothing else.

    chat MODEL         SERVER    the request, from its arrival to its last byte
    ├─ gather          INTERNAL  body, token ids, block hashes
    ├─ decide          INTERNAL  one per attempt: the candidates, the choice, the numbers of a refusal
    ├─ wait            INTERNAL  in the gateway, for a place
    ├─ prefill         CLIENT    the leg at the prefill engine, whose own spans join here
    ├─ hand_off        INTERNAL  from the end of the prefill to the first token (streams only: else nobody sees it)
    └─ decode          CLIENT    the leg at the decode engine, whose own spans join here

Names: `gen_ai.*`, `http.*`, `error.type` as the semantic conventions have them (OpenTelemetry GenAI semantic
conventions, spans, 2026), what they have no name for under `sluice.*`. Every value is bounded: text is cut at
`MAX_TEXT_CHARS`, lists at three candidates. Prompt text only with `telemetry.prompt_text`.
"""

from __future__ import annotations

import logging
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import structlog
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from gateway.config import OtlpProtocol, TelemetrySettings
from gateway.core.errors import ConfigError
from gateway.core.types import Estimate
from gateway.records import Attempt, Outcome, RequestRecord
from gateway.trace_context import Trace

OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion", "/v1/embeddings": "embeddings"}
"""Path -> `gen_ai.operation.name`; any other path has its last word."""
MAX_TEXT_CHARS = 256
MAX_PROMPT_CHARS = 32_768
SPAN_CANDIDATES = 3
BATCH_RECORDS = 64
"""Records sent at once: some 400 spans, near the 512 of OpenTelemetry's own batch processor."""
SEND_EVERY_S = 1.0
CLOSE_WITHIN_S = 2.0
"""How long the end of the gateway waits for spans not sent yet."""

Value: TypeAlias = str | bool | int | float | list[str] | list[int] | list[float]

log = structlog.get_logger("sluice.telemetry")


# ---- from a record to spans ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SpanMaker:
    """Makes the spans of a record. Pure but for the ids it draws."""

    resource: Resource
    scope: InstrumentationScope
    provider_of: Callable[[str], str | None]
    """Engine id -> which kind of engine it is, None when it is gone."""
    rng: random.Random

    def spans(self, record: RequestRecord) -> list[ReadableSpan]:
        """The request's span, then its children in the order of their beginning; none for a record without a trace."""
        trace = record.trace
        if trace is None:
            return []
        children = [child for attempt in record.attempts for child in self._attempt(record, trace, attempt)]
        return [self._root(record, trace), *self._gather(record, trace), *children]

    def _root(self, record: RequestRecord, trace: Trace) -> ReadableSpan:
        parent = trace.parent
        attributes = root_attributes(record, self._provider(record.estimate))
        return ReadableSpan(
            name=span_name(record),
            context=_context(trace, trace.span_id),
            parent=None if parent is None else _context(trace, parent.span_id, is_remote=True),
            resource=self.resource,
            attributes=attributes,
            kind=SpanKind.SERVER,
            status=_status(record),
            start_time=_ns(record, record.arrived_at),
            end_time=_ns(record, record.ended_at),
            instrumentation_scope=self.scope,
        )

    def _gather(self, record: RequestRecord, trace: Trace) -> Iterator[ReadableSpan]:
        if record.gathered_at is not None:
            attributes: dict[str, Value] = {"sluice.prompt_is_exact": record.is_prompt_exact}
            yield self._child(record, trace, "gather", record.arrived_at, record.gathered_at, attributes)

    def _attempt(self, record: RequestRecord, trace: Trace, attempt: Attempt) -> Iterator[ReadableSpan]:
        number: dict[str, Value] = {"sluice.attempt": attempt.number}
        decided_until = attempt.decided_at + attempt.decision_s
        yield self._child(
            record, trace, "decide", attempt.decided_at, decided_until, number | decision_attributes(attempt)
        )
        ended_at = record.ended_at if attempt.ended_at is None else attempt.ended_at
        waited_until = ended_at if attempt.sent_at is None else attempt.sent_at
        if waited_until > attempt.decided_at:
            yield self._child(record, trace, "wait", attempt.decided_at, waited_until, number)
        if attempt.sent_at is not None and attempt.estimate is not None:
            yield from self._legs(record, trace, attempt, attempt.estimate, attempt.sent_at, ended_at)

    def _legs(
        self, record: RequestRecord, trace: Trace, attempt: Attempt, estimate: Estimate, sent_at: float, ended_at: float
    ) -> Iterator[ReadableSpan]:
        failure, done_at = attempt.failure, attempt.prefilled_at
        if estimate.is_hand_off:
            leg = leg_attributes(attempt, estimate.prefill, self._provider_name(estimate.prefill))
            until = ended_at if done_at is None else done_at
            blamed = failure if done_at is None else None
            leg |= _known({"sluice.predicted_s": estimate.wait_s + estimate.fetch_s + estimate.prefill_s})
            yield self._child(
                record, trace, "prefill", sent_at, until, leg, blamed, SpanKind.CLIENT, attempt.prefill_span_id
            )
            if done_at is None:
                return
            if attempt.first_token_at is not None:
                move: dict[str, Value] = {"sluice.attempt": attempt.number}
                move["sluice.predicted_s"] = estimate.hand_off_s + estimate.join_s
                yield self._child(record, trace, "hand_off", done_at, attempt.first_token_at, move)
        leg = leg_attributes(attempt, estimate.decode, self._provider_name(estimate.decode))
        began_at = done_at if estimate.is_hand_off and done_at is not None else sent_at
        yield self._child(
            record, trace, "decode", began_at, ended_at, leg, failure, SpanKind.CLIENT, attempt.decode_span_id
        )

    def _child(
        self,
        record: RequestRecord,
        trace: Trace,
        name: str,
        began_at: float,
        ended_at: float,
        attributes: dict[str, Value],
        failure: str | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        span_id: int = 0,
    ) -> ReadableSpan:
        if failure is not None:
            attributes["error.type"] = _cut(failure)
        return ReadableSpan(
            name=name,
            context=_context(trace, span_id or self.rng.getrandbits(64) or 1),
            parent=_context(trace, trace.span_id),
            resource=self.resource,
            attributes=attributes,
            kind=kind,
            status=Status() if failure is None else Status(StatusCode.ERROR, _cut(failure)),
            start_time=_ns(record, began_at),
            end_time=_ns(record, max(began_at, ended_at)),
            instrumentation_scope=self.scope,
        )

    def _provider(self, estimate: Estimate | None) -> str:
        return "unknown" if estimate is None else self._provider_name(estimate.decode)

    def _provider_name(self, engine_id: str) -> str:
        return self.provider_of(engine_id) or "unknown"


def span_name(record: RequestRecord) -> str:
    """`{operation} {model}`; a model that nobody serves is the client's invention and stands in no name."""
    operation = _operation(record.path)
    is_served = record.model is not None and any(attempt.estimate is not None for attempt in record.attempts)
    return f"{operation} {_cut(record.model or '')}" if is_served else operation


def root_attributes(record: RequestRecord, provider: str) -> dict[str, Value]:
    """What is said of the request as a whole."""
    last = record.last
    reported_tokens = last.reported_prompt_tokens if last else None
    cached = record.cached_tokens
    estimate = record.estimate
    return _known(
        {
            "gen_ai.operation.name": _operation(record.path),
            "gen_ai.provider.name": provider,
            "gen_ai.request.model": record.model,
            "gen_ai.request.max_tokens": record.max_output_tokens,
            "gen_ai.request.stream": record.is_stream,
            "gen_ai.usage.input_tokens": record.prompt_tokens if reported_tokens is None else reported_tokens,
            "gen_ai.usage.output_tokens": record.output_tokens,
            "gen_ai.usage.cache_read.input_tokens": None if cached is None else cached[1],
            "gen_ai.response.time_to_first_chunk": record.ttft_s,
            "gen_ai.input.messages": None if record.prompt is None else record.prompt[:MAX_PROMPT_CHARS],
            "http.request.method": "POST",
            "http.response.status_code": record.status,
            "url.path": record.path,
            "error.type": None if record.outcome is Outcome.SERVED else record.reason or str(record.outcome),
            "sluice.request_id": record.id,
            "sluice.client_request_id": record.client_id,
            "sluice.tenant": record.tenant,
            "sluice.outcome": str(record.outcome),
            "sluice.reason": record.reason or None,
            "sluice.attempts": len(record.attempts),
            "sluice.prefill": estimate.prefill if estimate else None,
            "sluice.decode": estimate.decode if estimate else None,
            "sluice.wait_s": record.wait_s,
            "sluice.tbt_s": record.tbt_s,
            "sluice.predicted_ttft_s": record.predicted_ttft_s,
            "sluice.predicted_tbt_s": record.predicted_tbt_s,
            "sluice.slo.ttft_s": record.slo.ttft_s,
            "sluice.slo.tbt_s": record.slo.tbt_s,
            "sluice.slo.tpot_s": record.slo.tpot_s,
            "sluice.slo.deadline_s": record.slo.deadline_s,
            "sluice.headroom.ttft_s": record.ttft_headroom_s,
            "sluice.headroom.tbt_s": record.tbt_headroom_s,
            "sluice.cached_tokens.predicted": estimate.cached_tokens if estimate else None,
            "sluice.cached_tokens.reported": None if cached is None else cached[1],
            "sluice.refusal.message": record.message or None,
            "sluice.refusal.retry_after_s": record.retry_after_s,
        }
    )


def decision_attributes(attempt: Attempt) -> dict[str, Value]:
    """What was chosen, and from what: the three best pairs as parallel lists."""
    estimate, candidates = attempt.estimate, attempt.candidates
    said = _known(
        {
            "sluice.decision_us": round(attempt.decision_s * 1e6, 1),
            "sluice.prefill": estimate.prefill if estimate else None,
            "sluice.decode": estimate.decode if estimate else None,
            "sluice.predicted_ttft_s": estimate.ttft_s if estimate else None,
            "sluice.predicted_tbt_s": estimate.tbt_s if estimate else None,
        }
    )
    if candidates is not None:
        best = slice(SPAN_CANDIDATES)
        said["sluice.candidates.count"] = candidates.pair_count
        said["sluice.candidates.prefill"] = list(candidates.prefill[best])
        said["sluice.candidates.decode"] = list(candidates.decode[best])
        said["sluice.candidates.ttft_s"] = list(candidates.ttft_s[best])
        said["sluice.candidates.tbt_s"] = list(candidates.tbt_s[best])
        said["sluice.candidates.cached_tokens"] = list(candidates.cached_tokens[best])
    return said


def leg_attributes(attempt: Attempt, engine_id: str, provider: str) -> dict[str, Value]:
    """Which engine a leg went to."""
    return {"sluice.attempt": attempt.number, "sluice.engine": engine_id, "gen_ai.provider.name": provider}


def span_count(record: RequestRecord) -> int:
    """How many spans the record would become: what is lost with it."""
    count = 1 + (record.gathered_at is not None)
    for attempt in record.attempts:
        ended_at = record.ended_at if attempt.ended_at is None else attempt.ended_at
        count += 1 + ((ended_at if attempt.sent_at is None else attempt.sent_at) > attempt.decided_at)
        if attempt.is_hand_off:
            is_prefilled = attempt.prefilled_at is not None
            count += 1 + is_prefilled + (is_prefilled and attempt.first_token_at is not None)
        elif attempt.sent_at is not None:
            count += 1
    return count


def _operation(path: str) -> str:
    return OPERATIONS.get(path) or path.rpartition("/")[2]


def _known(attributes: dict[str, Value | None]) -> dict[str, Value]:
    """Those that have a value, text cut to its bound (a prompt has its own)."""
    return {
        name: _cut(value) if isinstance(value, str) and name != "gen_ai.input.messages" else value
        for name, value in attributes.items()
        if value is not None
    }


def _cut(text: str) -> str:
    return text[:MAX_TEXT_CHARS]


def _context(trace: Trace, span_id: int, *, is_remote: bool = False) -> SpanContext:
    state = trace.parent.tracestate if trace.parent else ""
    return SpanContext(
        trace_id=trace.trace_id,
        span_id=span_id,
        is_remote=is_remote,
        trace_flags=TraceFlags(TraceFlags.SAMPLED if trace.is_sampled else TraceFlags.DEFAULT),
        trace_state=TraceState.from_header([state]) if state else TraceState(),
    )


def _status(record: RequestRecord) -> Status:
    """An error when the fault is on this side; a server span of a 4xx stays unset (HTTP semantic conventions)."""
    is_ours = record.outcome in (Outcome.BROKEN, Outcome.ERROR) or (record.status or 0) >= 500
    return Status(StatusCode.ERROR, _cut(record.reason)) if is_ours else Status()


def _ns(record: RequestRecord, at: float) -> int:
    return int(record.unix_s(at) * 1e9)


# ---- out of the process ----------------------------------------------------------------------------------------------


class Taker(Protocol):
    """Where spans go: OpenTelemetry's exporters."""

    def export(self, spans: list[ReadableSpan], /) -> SpanExportResult: ...

    def shutdown(self) -> None: ...


@dataclass(slots=True)
class SpanCounts:
    """Spans by what became of them, since the start."""

    exported: int = 0
    queue_full: int = 0
    """Dropped: the collector did not keep up."""
    refused: int = 0
    """Dropped: the collector was away, too slow, or did not want them."""


class _LastWords(logging.Handler):
    """Keeps what the exporters last complained of; they only return that they failed."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.said = record.getMessage()[:MAX_TEXT_CHARS]


class SpanExport:
    """An observer of records: queues those that are sampled, for a thread that sends them."""

    def __init__(self, taker: Taker, maker: SpanMaker, *, queue_count: int) -> None:
        """At most `queue_count` >= 1 records wait; those beyond are dropped and counted."""
        self.counts = SpanCounts()
        self._taker = taker
        self._maker = maker
        self._queue_count = queue_count
        self._queue: deque[RequestRecord] = deque()
        self._wake = threading.Event()
        self._is_closing = False
        self._is_taken = True
        self._words = _LastWords()
        self._logger = logging.getLogger("opentelemetry")
        self._logger.addHandler(self._words)
        self._logger.propagate = False  # it would print each failed batch on standard error, past our log format
        self._thread = threading.Thread(target=self._run, name="sluice-spans", daemon=True)
        self._thread.start()

    def __call__(self, record: RequestRecord) -> None:
        """Takes a finished record. Never waits."""
        if record.trace is None or not record.trace.is_sampled:
            return
        if len(self._queue) >= self._queue_count:
            self.counts.queue_full += span_count(record)
            return
        self._queue.append(record)
        if len(self._queue) >= BATCH_RECORDS:
            self._wake.set()

    @property
    def waiting_count(self) -> int:
        """Records not sent yet."""
        return len(self._queue)

    def close(self) -> None:
        """Sends what is queued if that can be done in `CLOSE_WITHIN_S`, then ends. Blocks for so long at most."""
        self._is_closing = True
        self._wake.set()
        self._thread.join(CLOSE_WITHIN_S)
        self._taker.shutdown()
        self._logger.removeHandler(self._words)

    def _run(self) -> None:
        while not self._is_closing:
            self._wake.wait(SEND_EVERY_S)
            self._wake.clear()
            self._send_all()
        self._send_all()

    def _send_all(self) -> None:
        while self._queue:
            records = [self._queue.popleft() for _ in range(min(BATCH_RECORDS, len(self._queue)))]
            self._send([span for record in records for span in self._maker.spans(record)])

    def _send(self, spans: list[ReadableSpan]) -> None:
        try:
            is_taken = self._taker.export(spans) is SpanExportResult.SUCCESS
        except Exception as error:  # whatever an exporter raises, the thread goes on
            self._words.said, is_taken = f"{type(error).__name__}: {error}"[:MAX_TEXT_CHARS], False
        if is_taken:
            self.counts.exported += len(spans)
        else:
            self.counts.refused += len(spans)
        if is_taken is not self._is_taken:
            self._is_taken = is_taken
            if is_taken:
                log.info("spans_are_taken_again")
            else:
                log.warning("spans_are_not_taken", reason=self._words.said)


def span_export(
    settings: TelemetrySettings, version: str, provider_of: Callable[[str], str | None]
) -> SpanExport | None:
    """What sends spans as the settings ask for; None when no collector is named. Raises ConfigError."""
    if settings.endpoint is None:
        return None
    resource = Resource.create({"service.name": settings.service_name, "service.version": version})
    maker = SpanMaker(resource, InstrumentationScope("sluice", version), provider_of, random.Random())
    return SpanExport(_exporter(settings, settings.endpoint), maker, queue_count=settings.queue_requests)


def _exporter(settings: TelemetrySettings, endpoint: str) -> SpanExporter:
    """Imported here: gRPC alone takes longer to load than the rest of the gateway, and most do not use it."""
    if settings.protocol is OtlpProtocol.GRPC:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as Grpc

        return Grpc(endpoint=endpoint, insecure=endpoint.startswith("http:"), timeout=settings.timeout_s)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as Http

    host, _, path = endpoint.partition("://")[2].partition("/")
    if not host:
        raise ConfigError(f"telemetry.endpoint: {endpoint} names no host")
    return Http(endpoint=endpoint if path else f"{endpoint.rstrip('/')}/v1/traces", timeout=settings.timeout_s)
