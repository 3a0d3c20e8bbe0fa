"""The `/metrics` page of an emulated vLLM: names, types, labels and buckets of version 0.32.0.

Counters and gauges are read from the engine at each scrape; histograms are fed by outcomes. Buckets of latencies are
in engine seconds. Source: vllm v1/metrics/{loggers,buckets}.py, nixl/stats.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector, CollectorRegistry

from loadtest.engine import Engine
from loadtest.engine_types import Finished, Outcome, Tokens, TransferFinished

_LABELS = ["model_name", "engine"]
_LATENCY = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_FIRST_TOKEN_TAIL = (640, 2560)
_GAP = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_ITERATION = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_TRANSFER = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 5)
_DESCRIPTORS = (10, 20, 30, 50, 75, 100, 200, 400, 1000, 2000, 4000, 10000, 20000, 50000)
_BYTES = tuple(2 ** (10 + i) for i in range(1, 25, 2))

_Values: TypeAlias = list[tuple[str, str, float | dict[str, float], str]]
"""(name, documentation, value or values by extra label, name of the extra label)."""


def _request_tokens_buckets(longest: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50 ... up to the longest request."""
    steps = [m * 10**e for e in range(9) for m in (1, 2, 5)]
    return tuple(float(step) for step in steps if step <= longest)


class VllmMetrics(Collector):
    """One engine's metrics in a registry of its own."""

    def __init__(self, engine: Engine, model: str, *, has_nixl: bool = True) -> None:
        self._has_nixl = has_nixl
        self._engine = engine
        self._labels = [model, "0"]
        self._registry = CollectorRegistry()
        self._last_token_at: dict[str, float] = {}
        tokens = _request_tokens_buckets(engine.settings.max_model_tokens)
        self._first_token = self._histogram("time_to_first_token_seconds", (*_FIRST_TOKEN, *_FIRST_TOKEN_TAIL))
        self._gap = self._histogram("inter_token_latency_seconds", _GAP)
        self._per_token = self._histogram("request_time_per_output_token_seconds", _GAP)
        self._end_to_end = self._histogram("e2e_request_latency_seconds", _LATENCY)
        self._queued = self._histogram("request_queue_time_seconds", _LATENCY)
        self._inference = self._histogram("request_inference_time_seconds", _LATENCY)
        self._prefill = self._histogram("request_prefill_time_seconds", _LATENCY)
        self._decode = self._histogram("request_decode_time_seconds", _LATENCY)
        self._iteration = self._histogram("iteration_tokens_total", _ITERATION)
        self._output_tokens = self._histogram("request_generation_tokens", tokens)
        self._preempted = self._histogram("request_num_preemptions", (1, 2, 3, 4, 5, 10, 20))
        self._transfer = self._histogram("nixl_xfer_time_seconds", _TRANSFER)
        self._post = self._histogram("nixl_post_time_seconds", (0.001, *_TRANSFER))
        self._bytes = self._histogram("nixl_bytes_transferred", _BYTES)
        self._descriptors = self._histogram("nixl_num_descriptors", _DESCRIPTORS)
        self._registry.register(self)

    def render(self) -> bytes:
        """The page in Prometheus text format."""
        page = prometheus_client.generate_latest(self._registry)
        if self._has_nixl:
            return page
        return b"".join(line for line in page.splitlines(keepends=True) if b"vllm:nixl_" not in line)

    def observe(self, outcomes: Iterable[Outcome]) -> None:
        """Feeds the histograms."""
        for outcome in outcomes:
            if isinstance(outcome, Tokens):
                self._observe_tokens(outcome)
            elif isinstance(outcome, Finished):
                self._observe_end(outcome)
            elif isinstance(outcome, TransferFinished):
                self._observe_transfer(outcome)

    def _observe_tokens(self, tokens: Tokens) -> None:
        for at in tokens.token_at.tolist():
            self._iteration.observe(len(tokens.request_ids))
            for request_id in tokens.request_ids:
                if (last_at := self._last_token_at.get(request_id)) is not None:
                    self._gap.observe(at - last_at)
                self._last_token_at[request_id] = at

    def _observe_transfer(self, transfer: TransferFinished) -> None:
        """One descriptor per block; the emulator posts a transfer in no time."""
        settings = self._engine.settings
        self._transfer.observe(transfer.at - transfer.started_at)
        self._post.observe(0.0)
        self._bytes.observe(transfer.size_bytes)
        self._descriptors.observe(transfer.size_bytes // (settings.kv_token_bytes * settings.block_tokens))

    def _observe_end(self, end: Finished) -> None:
        last_at = self._last_token_at.pop(end.request_id, None)
        if end.scheduled_at is None or end.first_token_at is None or last_at is None:
            return
        self._first_token.observe(end.first_token_at - end.arrived_at)
        self._queued.observe(max(0.0, end.scheduled_at - end.arrived_at))
        self._prefill.observe(end.first_token_at - end.scheduled_at)
        self._decode.observe(last_at - end.first_token_at)
        self._inference.observe(last_at - end.scheduled_at)
        self._end_to_end.observe(end.at - end.arrived_at)
        self._output_tokens.observe(end.output_tokens)
        self._preempted.observe(end.preemptions)
        if end.output_tokens > 1:
            self._per_token.observe((last_at - end.first_token_at) / (end.output_tokens - 1))

    def collect(self) -> Iterable[Metric]:
        """Called by the registry at each scrape."""
        yield self._cache_config()
        for name, text, value, label in self._gauges():
            yield self._family(GaugeMetricFamily(f"vllm:{name}", text, labels=_extended(label)), value)
        for name, text, value, label in self._counters():
            yield self._family(CounterMetricFamily(f"vllm:{name}", text, labels=_extended(label)), value)

    def _gauges(self) -> _Values:
        load = self._engine.load()
        waiting = load.waiting_count + load.deferred_count
        by_reason = {"capacity": float(load.waiting_count), "deferred": float(load.deferred_count)}
        stages = {
            "waiting_to_start": float(load.deferred_count - load.fetching_count - load.fetched_count),
            "in_progress": float(load.fetching_count),
            "completed_waiting": float(load.fetched_count),
        }
        sleep = {"awake": 1.0, "weights_offloaded": 0.0, "discard_all": 0.0}
        return [
            ("num_requests_running", "Number of requests in model execution batches.", load.running_count, ""),
            ("num_requests_waiting", "Number of requests waiting to be processed.", waiting, ""),
            ("num_requests_waiting_by_reason", "Number of waiting requests by reason.", by_reason, "reason"),
            ("num_requests_kv_fetch_by_stage", "Number of waiting requests by async KV load stage.", stages, "stage"),
            ("engine_sleep_state", "Engine sleep state.", sleep, "sleep_state"),
            ("kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", load.kv_usage_ratio, ""),
        ]

    def _counters(self) -> _Values:
        c = self._engine.counters
        hits, external = float(c.prefix_hit_tokens), float(c.external_hit_tokens)
        by_source = {
            "local_compute": float(c.computed_prompt_tokens),
            "local_cache_hit": float(c.prompt_tokens - c.computed_prompt_tokens - c.fetched_prompt_tokens),
            "external_kv_transfer": float(c.fetched_prompt_tokens),
        }
        cached = float(c.prompt_tokens - c.computed_prompt_tokens)
        tiers = {"device": hits, "host": 0.0, "p2p": external, "disk": 0.0, "external_unspecified": 0.0}
        ends = {reason.value: float(count) for reason, count in c.finished.items()} | {"repetition": 0.0}
        return [
            ("prefix_cache_queries", "Prefix cache queries, in tokens.", c.prefix_query_tokens, ""),
            ("prefix_cache_hits", "Prefix cache hits, in tokens.", hits, ""),
            ("external_prefix_cache_queries", "KV connector cache queries, in tokens.", c.external_query_tokens, ""),
            ("external_prefix_cache_hits", "KV connector cache hits, in tokens.", external, ""),
            ("num_preemptions", "Cumulative number of preemption from the engine.", c.preemptions, ""),
            ("prompt_tokens", "Number of prefill tokens processed.", c.prompt_tokens, ""),
            ("prompt_tokens_by_source", "Number of prompt tokens by source.", by_source, "source"),
            ("prompt_tokens_cached", "Number of cached prompt tokens (local + external).", cached, ""),
            ("prompt_tokens_cached_by_source", "Prefix-cache hit tokens by tier.", tiers, "source"),
            ("generation_tokens", "Number of generation tokens processed.", c.generated_tokens, ""),
            ("request_success", "Count of successfully processed requests.", ends, "finished_reason"),
            ("nixl_num_failed_transfers", "Failed NIXL KV Cache transfers.", c.failed_transfers, ""),
            ("nixl_num_failed_notifications", "Failed NIXL KV Cache notifications.", 0, ""),
            ("nixl_num_kv_expired_reqs", "Requests that had their KV expire.", c.expired_leases, ""),
            ("nixl_num_notifications_after_expiry", "Late notifications.", c.reads_after_release, ""),
        ]

    def _cache_config(self) -> Metric:
        settings = self._engine.settings
        labels = {
            "block_size": str(settings.block_tokens),
            "cache_dtype": "auto",
            "enable_prefix_caching": "True",
            "engine": "0",
            "kv_cache_size_tokens": str(settings.kv_blocks * settings.block_tokens),
            "num_gpu_blocks": str(settings.kv_blocks),
            "prefix_caching_hash_algo": "sha256",
        }
        info = GaugeMetricFamily(
            "vllm:cache_config_info", "Information of the LLMEngine CacheConfig", labels=list(labels)
        )
        info.add_metric(list(labels.values()), 1.0)
        return info

    def _family(
        self, family: GaugeMetricFamily | CounterMetricFamily, value: float | dict[str, float]
    ) -> GaugeMetricFamily | CounterMetricFamily:
        if not isinstance(value, dict):
            family.add_metric(self._labels, float(value))
            return family
        for label, part in value.items():
            family.add_metric([*self._labels, label], part)
        return family

    def _histogram(self, name: str, buckets: tuple[float, ...]) -> prometheus_client.Histogram:
        text = f"Histogram of {name}."
        metric = prometheus_client.Histogram(f"vllm:{name}", text, _LABELS, buckets=buckets, registry=self._registry)
        return metric.labels(*self._labels)


def _extended(label: str) -> list[str]:
    return [*_LABELS, label] if label else _LABELS
