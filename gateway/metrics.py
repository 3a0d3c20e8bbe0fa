"""Prometheus: counters and histograms fed by finished records, gauges read from the ledger when they are scraped.

Nothing is counted per token and no number is kept twice: what the scheduler, the relay or the span export know they are
asked for at the scrape. Labels are bounded: engines are those of the ledger now, reasons are the core's own words,
tenants are the first `max_tenants` that came and `other`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from gateway.core.cluster import EngineState
from gateway.core.prefixes import SOURCES
from gateway.core.stranded import StrandedKv
from gateway.core.types import Health, Role
from gateway.driver import Driver
from gateway.records import Attempt, Outcome, RequestRecord
from gateway.relay import RelayTotals
from gateway.telemetry import SpanCounts

CONTENT_TYPE = CONTENT_TYPE_LATEST
OTHER = "other"
NO_REASON = "none"
COVERAGE_WINDOW = 1_000
"""Predictions of which the covered share is told: enough that one per cent is ten of them."""
LAG_EVERY_S = 0.25
MAX_FAILURE_REASONS = 64

LONG_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
SHORT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
TINY_S = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 1e-2, 1e-1)
_MAGNITUDES_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)
SIGNED_S = (*(-edge for edge in reversed(_MAGNITUDES_S)), 0.0, *_MAGNITUDES_S)
"""Both signs alike, from a token gap's error to a queue's: below 0 is too late for headroom, too early for an error."""


@dataclass(slots=True)
class BoundedLabels:
    """Label values: the first `limit` distinct ones stay as they are, later ones are `other`.

    First come, not most frequent: a value that changed between its own name and `other` would break its counter.
    """

    limit: int
    _known: set[str] = field(default_factory=set)

    def __getitem__(self, value: str) -> str:
        if value in self._known:
            return value
        if len(self._known) >= self.limit:
            return OTHER
        self._known.add(value)
        return value


@dataclass(slots=True)
class Coverage:
    """Share of the last predictions that were not exceeded."""

    _recent: deque[bool] = field(default_factory=lambda: deque(maxlen=COVERAGE_WINDOW))
    _covered: int = 0

    def add(self, *, predicted_s: float, actual_s: float) -> None:
        if len(self._recent) == COVERAGE_WINDOW:
            self._covered -= self._recent[0]
        is_covered = actual_s <= predicted_s
        self._recent.append(is_covered)
        self._covered += is_covered

    @property
    def ratio(self) -> float | None:
        """0 <= ratio <= 1; None before the first."""
        return self._covered / len(self._recent) if self._recent else None


class Metrics:
    """An observer of records, and what `/metrics` answers."""

    def __init__(
        self,
        driver: Driver,
        *,
        max_tenants: int,
        stranded: StrandedKv | None = None,
        relayed: RelayTotals | None = None,
        spans: Callable[[], SpanCounts | None] = lambda: None,
        version: str = "",
    ) -> None:
        self.registry = CollectorRegistry()
        self.coverage = {Role.PREFILL: Coverage(), Role.DECODE: Coverage()}
        self.stranded = stranded or StrandedKv()
        self._tenants = BoundedLabels(max_tenants)
        self._failures = BoundedLabels(MAX_FAILURE_REASONS)
        self._loop_timer: asyncio.TimerHandle | None = None
        self._define()
        self.registry.register(Scraped(driver, self, relayed or RelayTotals(), spans, version))
        ProcessCollector(registry=self.registry)

    def _define(self) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=self.registry)

        def histogram(name: str, text: str, edges: Iterable[float], *labels: str) -> Histogram:
            return Histogram(name, text, labels, buckets=tuple(edges), registry=self.registry)

        self.requests = counter("sluice_requests", "Requests that are over.", "outcome", "reason")
        self.decisions = counter("sluice_decisions", "Decisions: dispatch, wait or reject.", "decision", "reason")
        self.attempt_failures = counter(
            "sluice_attempt_failures", "Attempts that failed before the first token.", "reason"
        )
        self.tenant_requests = counter("sluice_tenant_requests", "Requests that are over.", "tenant", "outcome")
        self.tenant_tokens = counter("sluice_tenant_tokens", "Tokens of served requests.", "tenant", "kind")
        self.prompt_tokens = counter("sluice_prompt_tokens", "Prompt tokens whose cached part the engine told.")
        self.cached_tokens = counter("sluice_cached_tokens", "Of those, cached ones: predicted, reported.", "source")
        self.ttft = histogram("sluice_ttft_seconds", "From arrival to the first token.", LONG_S)
        self.tbt = histogram("sluice_tbt_seconds", "Mean of a stream's slowest 10 % of token gaps.", SHORT_S)
        self.duration = histogram("sluice_request_duration_seconds", "From arrival to the end.", LONG_S)
        self.wait = histogram("sluice_wait_seconds", "Time in the gateway before a place was free.", LONG_S)
        self.decision = histogram("sluice_decision_seconds", "Time one decision took.", TINY_S)
        self.headroom = histogram(
            "sluice_headroom_seconds", "SLO less prediction: TTFT (prefill), TBT (decode).", SIGNED_S, "role"
        )
        self.error = histogram(
            "sluice_prediction_error_seconds", "Actual less predicted: TTFT (prefill), TBT (decode).", SIGNED_S, "role"
        )
        self.loop_lag = histogram("sluice_event_loop_lag_seconds", "How late a timer of the event loop ran.", TINY_S)
        self._error = {role: self.error.labels(role) for role in self.coverage}
        self._headroom = {role: self.headroom.labels(role) for role in self.coverage}
        self._served = self.requests.labels(Outcome.SERVED, NO_REASON)
        self._dispatched = self.decisions.labels("dispatch", NO_REASON)

    # ---- fed --------------------------------------------------------------------------------------------------------

    def __call__(self, record: RequestRecord) -> None:
        """Counts a finished record."""
        if record.outcome is Outcome.SERVED:
            self._served.inc()
        else:
            reason = record.reason if record.outcome is Outcome.REFUSED else NO_REASON
            self.requests.labels(record.outcome, reason).inc()
        for attempt in record.attempts:
            self._count_attempt(record, attempt)
        self._count_times(record)
        self._count_tokens(record)

    def _count_attempt(self, record: RequestRecord, attempt: Attempt) -> None:
        self.decision.observe(attempt.decision_s)
        if attempt.has_waited or (attempt.sent_at is None and (attempt.ended_at or 0.0) > attempt.decided_at):
            self.decisions.labels("wait", "engines_full").inc()
        if attempt.sent_at is not None:
            self._dispatched.inc()
        elif attempt is record.last and record.outcome is Outcome.REFUSED:
            self.decisions.labels("reject", record.reason).inc()
        if attempt.failure is not None:
            self.attempt_failures.labels(self._failures[attempt.failure]).inc()

    def _count_times(self, record: RequestRecord) -> None:
        self.duration.observe(record.ended_at - record.arrived_at)
        if record.attempts:
            self.wait.observe(record.wait_s)
        pairs = (
            (Role.PREFILL, self.ttft, record.ttft_s, record.predicted_ttft_s, record.slo.ttft_s),
            (Role.DECODE, self.tbt, record.tbt_s, record.predicted_tbt_s, record.slo.step_s),
        )
        for role, actual, actual_s, predicted_s, bound_s in pairs:
            if actual_s is not None:
                actual.observe(actual_s)
            if predicted_s is None:
                continue
            if bound_s is not None:
                self._headroom[role].observe(bound_s - predicted_s)
            if actual_s is not None:
                self._error[role].observe(actual_s - predicted_s)
                self.coverage[role].add(predicted_s=predicted_s, actual_s=actual_s)

    def _count_tokens(self, record: RequestRecord) -> None:
        tenant = self._tenants[record.tenant]
        self.tenant_requests.labels(tenant, record.outcome).inc()
        if record.outcome is not Outcome.SERVED:
            return
        last = record.last
        prompt_tokens = (last.reported_prompt_tokens if last else None) or record.prompt_tokens or 0
        self.tenant_tokens.labels(tenant, "prompt").inc(prompt_tokens)
        self.tenant_tokens.labels(tenant, "output").inc(record.output_tokens or 0)
        if (cached := record.cached_tokens) is not None:
            self.prompt_tokens.inc(prompt_tokens)
            self.cached_tokens.labels("predicted").inc(cached[0])
            self.cached_tokens.labels("reported").inc(cached[1])

    # ---- the event loop ---------------------------------------------------------------------------------------------

    def watch_loop(self) -> None:
        """Begins to measure how late timers run."""
        self._tick(asyncio.get_running_loop(), None)

    def _tick(self, loop: asyncio.AbstractEventLoop, due_at: float | None) -> None:
        now = loop.time()
        if due_at is not None:
            self.loop_lag.observe(max(0.0, now - due_at))
        self._loop_timer = loop.call_later(LAG_EVERY_S, self._tick, loop, now + LAG_EVERY_S)

    def close(self) -> None:
        """Stops the timer."""
        if self._loop_timer is not None:
            self._loop_timer.cancel()

    def render(self) -> bytes:
        """The answer of `/metrics`."""
        return generate_latest(self.registry)


# ---- read at the scrape ----------------------------------------------------------------------------------------------


def gauge(name: str, text: str, rows: Iterable[tuple[tuple[str, ...], float | None]], *labels: str) -> Metric:
    """A gauge with those of the rows that have a value."""
    family = GaugeMetricFamily(name, text, labels=labels)
    for values, value in rows:
        if value is not None:
            family.add_metric(values, value)
    return family


def counter(name: str, text: str, rows: Iterable[tuple[tuple[str, ...], float]], *labels: str) -> Metric:
    """A counter kept elsewhere."""
    family = CounterMetricFamily(name, text, labels=labels)
    for values, value in rows:
        family.add_metric(values, value)
    return family


@dataclass(frozen=True, slots=True, eq=False)
class Scraped(Collector):
    """What the rest of the gateway knows anyway."""

    driver: Driver
    fed: Metrics
    relayed: RelayTotals
    spans: Callable[[], SpanCounts | None]
    version: str

    def collect(self) -> Iterator[Metric]:
        """Every family, whether or not it has rows."""
        yield gauge("sluice_build_info", "Always 1.", [((self.version,), 1)], "version")
        yield from self._requests()
        yield from self._engines()
        yield from self._prefixes()
        yield from self._predictions()
        yield from self._traffic()

    def describe(self) -> Iterator[Metric]:
        """Nothing: it would collect to find its names out."""
        return iter(())

    def _requests(self) -> Iterator[Metric]:
        scheduler = self.driver.scheduler
        reservations = scheduler.cluster.reservations
        leases: dict[str, int] = {}
        for reservation in reservations.values():
            if scheduler.leases.holds(reservation.request.id):
                continue  # its own gateway tells of it
            is_open = reservation.prefill_done_at is not None and reservation.first_token_at is None
            if is_open and reservation.estimate.is_hand_off:
                leases[reservation.estimate.prefill] = leases.get(reservation.estimate.prefill, 0) + 1
        yield gauge(
            "sluice_in_flight_requests", "Dispatched and not over.", [((), len(reservations) - len(scheduler.leases))]
        )
        yield gauge("sluice_waiting_requests", "Waiting in the gateway.", [((), scheduler.waiting_count)])
        yield gauge("sluice_open_requests", "Arrived and not over.", [((), self.driver.recorder.open_count)])
        yield gauge("sluice_kv_leases", "KV held for a first token.", _by_engine(leases), "engine")
        yield from self._stranded()

    def _stranded(self) -> Iterator[Metric]:
        rows = [((name,), each) for name, each in self.fed.stranded.by_connector(now=self.driver.now()).items()]
        held = [(labels, each.blocks) for labels, each in rows]
        yield gauge("sluice_stranded_kv_blocks", "KV that no one will read.", held, "connector")
        held_s = [(labels, each.block_s) for labels, each in rows]
        yield counter("sluice_stranded_kv_block_seconds", "The same, times seconds.", held_s, "connector")
        failed = [(labels, float(each.hand_offs)) for labels, each in rows]
        yield counter("sluice_stranded_hand_offs", "Hand-offs that left KV behind.", failed, "connector")

    def _engines(self) -> Iterator[Metric]:
        now = self.driver.now()
        states = [
            ((state.engine.id, str(state.engine.role)), state)
            for state in self.driver.scheduler.cluster.engines.values()
        ]

        def each(name: str, text: str, value: Callable[[EngineState], float | None]) -> Metric:
            return gauge(name, text, [(labels, value(state)) for labels, state in states], "engine", "role")

        yield each("sluice_engine_up", "1: it is a candidate.", lambda state: float(state.health is Health.UP))
        yield each("sluice_engine_in_flight_requests", "Ours and others'.", lambda state: state.in_flight_count)
        yield each("sluice_engine_kv_tokens", "KV of our requests there.", lambda state: state.kv_tokens)
        yield each("sluice_engine_prefill_work_seconds", "Prefill work ahead.", lambda state: state.prefill_work_s(now))
        yield each(
            "sluice_engine_report_age_seconds",
            "Age of its last report.",
            lambda state: None if state.reported_at is None else now - state.reported_at,
        )
        yield each(
            "sluice_engine_kv_usage_ratio",
            "Share of its KV blocks in use, as it reported.",
            lambda state: state.report.kv_usage_ratio if state.report else None,
        )
        yield each(
            "sluice_engine_queued_requests",
            "Waiting inside the engine, as it reported.",
            lambda state: state.report.waiting_count if state.report else None,
        )

    def _prefixes(self) -> Iterator[Metric]:
        prefixes = self.driver.scheduler.prefixes
        names = list(self.driver.scheduler.cluster.engines)
        checks = [(name, agreement) for name in names if (agreement := prefixes.agreement(name)) is not None]
        yield gauge("sluice_index_blocks", "KV blocks in the index.", [((), len(prefixes.index))])
        yield counter("sluice_index_evicted_blocks", "Dropped for room.", [((), prefixes.index.evicted_count)])
        yield gauge(
            "sluice_prefix_source",
            "1: the way in which that engine's cache is known.",
            [((name, str(source)), float(prefixes.source(name) is source)) for name in names for source in SOURCES],
            "engine",
            "source",
        )
        yield gauge(
            "sluice_prefix_agreement_ratio",
            "Share of recent cache predictions that were right.",
            [((name,), agreement.ratio) for name, agreement in checks],
            "engine",
        )

    def _predictions(self) -> Iterator[Metric]:
        rows = [((str(role),), coverage.ratio) for role, coverage in self.fed.coverage.items()]
        yield gauge("sluice_prediction_coverage_ratio", "Share of recent ones not exceeded.", rows, "role")

    def _traffic(self) -> Iterator[Metric]:
        relayed, spans = self.relayed, self.spans() or SpanCounts()
        yield gauge("sluice_relay_streams", "Streams being relayed.", [((), relayed.open_count)])
        yield counter("sluice_relay_bytes", "Bytes relayed to clients.", [((), relayed.sent_bytes)])
        yield counter("sluice_relay_stalls", "Pauses for a slow client.", [((), relayed.stall_count)])
        rows = [(("exported",), spans.exported), (("queue_full",), spans.queue_full), (("refused",), spans.refused)]
        yield counter("sluice_spans", "Spans by what became of them.", rows, "result")


def _by_engine(counts: dict[str, int]) -> list[tuple[tuple[str, ...], float | None]]:
    return [((name,), count) for name, count in sorted(counts.items())]
