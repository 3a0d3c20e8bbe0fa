"""What an SGLang engine says of itself: its load, its models and how it was started, as facts.

`/v1/loads` has one entry per data-parallel rank. Counts and capacities add up; the KV usage of the whole is the tokens
in use of all ranks over the capacity of all. Requests on their way to a batch (a prefill engine's waiting for their
decode engine, a decode engine's waiting for memory or for their KV) are in `num_waiting_reqs` already; those a prefill
engine has computed and not yet handed over are in no batch and in no queue, and count as running.

Source: sglang 0.5.23, managers/load_snapshot.py, entrypoints/http_server.py, observability/metrics_collector.py, and
what a real pair told with requests held in each of these places.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Annotated, Final, TypeVar

import msgspec
from msgspec import Meta, Struct

from adapters.base import Facts
from adapters.prometheus import samples
from adapters.sglang.bodies import LOW_PRIORITY_FIRST, TOLD_BOOTSTRAP_PORT
from adapters.sglang.rooms import RANKS
from gateway.core.errors import MalformedEngineData
from gateway.core.types import Report, Role

_Count = Annotated[int, Meta(ge=0, le=2**62)]

RUNNING: Final = "sglang:num_running_reqs"
QUEUED: Final = "sglang:num_queue_reqs"
ON_THE_WAY: Final = (
    "sglang:num_prefill_bootstrap_queue_reqs",
    "sglang:num_decode_prealloc_queue_reqs",
    "sglang:num_decode_transfer_queue_reqs",
)
IN_FLIGHT: Final = "sglang:num_prefill_inflight_queue_reqs"
USED_TOKENS: Final = "sglang:num_used_tokens"
CAPACITY: Final = "sglang:max_total_num_tokens"
PROMPT_TOKENS: Final = "sglang:prompt_tokens_total"
CACHED_TOKENS: Final = "sglang:cached_tokens_total"
THROUGHPUT: Final = "sglang:gen_throughput"
_METRICS: Final = (
    *(RUNNING, QUEUED, *ON_THE_WAY, IN_FLIGHT),
    *(USED_TOKENS, CAPACITY, PROMPT_TOKENS, CACHED_TOKENS, THROUGHPUT),
)


class _Disaggregation(Struct):
    prefill_inflight_queue_reqs: _Count = 0


class _Load(Struct):
    """One rank."""

    num_running_reqs: _Count
    num_waiting_reqs: _Count
    num_waiting_uncached_tokens: _Count | None = None
    num_used_tokens: _Count | None = None
    max_total_num_tokens: _Count | None = None
    gen_throughput: float | None = None
    disaggregation: _Disaggregation | None = None

    @property
    def in_flight_count(self) -> int:
        """Prompts computed and not yet handed over."""
        return self.disaggregation.prefill_inflight_queue_reqs if self.disaggregation else 0


class _Loads(Struct):
    loads: Annotated[list[_Load], Meta(min_length=1)]


class _Model(Struct):
    id: Annotated[str, Meta(min_length=1)]
    max_model_len: Annotated[int, Meta(ge=1)] | None = None
    parent: str | None = None
    """The base model of a LoRA adapter."""


class _ModelList(Struct):
    data: list[_Model]


class _ServerInfo(Struct):
    disaggregation_mode: str | None = None
    """`prefill`, `decode`, or `null` (the word) for an engine that does both."""
    disaggregation_bootstrap_port: Annotated[int, Meta(ge=1, le=65_535)] | None = None
    page_size: Annotated[int, Meta(ge=1)] | None = None
    max_total_num_tokens: Annotated[int, Meta(ge=1)] | None = None
    """Of one rank."""
    context_length: Annotated[int, Meta(ge=1)] | None = None
    dp_size: Annotated[int, Meta(ge=1, le=65_535)] = 1
    schedule_low_priority_values_first: bool = False


_ROLES: Final = {"prefill": Role.PREFILL, "decode": Role.DECODE, "null": Role.BOTH}
_T = TypeVar("_T", bound=Struct)


def parse_report(body: bytes) -> Facts:
    """Load and KV capacity (tokens) from `/v1/loads`, or from a metrics page. Raises MalformedEngineData."""
    return _of_loads(_decode(body, _Loads, "load")) if body.lstrip().startswith(b"{") else _of_metrics(body)


def parse_models(body: bytes) -> Facts:
    """Model names, LoRA adapters included, in the engine's order, and the longest context (tokens).

    Raises MalformedEngineData.
    """
    models = _decode(body, _ModelList, "model list").data
    limits = [model.max_model_len for model in models if model.max_model_len is not None]
    return Facts(
        models=tuple(model.id for model in models),
        lora_names=tuple(model.id for model in models if model.parent is not None),
        max_model_tokens=max(limits, default=None),
    )


def parse_facts(body: bytes) -> Facts:
    """Role, page size (tokens), KV capacity (tokens, all ranks), longest context (tokens), ranks and bootstrap port.

    An engine of a disaggregated pool serves nothing alone: without a room it refuses the request. Raises
    MalformedEngineData, also for a mode that is none of the known ones.
    """
    info = _decode(body, _ServerInfo, "server info")
    role = _ROLES.get(info.disaggregation_mode or "null")
    if role is None:
        raise MalformedEngineData(f"The engine runs in an unknown disaggregation mode: {info.disaggregation_mode!r}.")
    details: dict[str, int | str] = {RANKS: info.dp_size, LOW_PRIORITY_FIRST: info.schedule_low_priority_values_first}
    if role is Role.PREFILL and info.disaggregation_bootstrap_port is not None:
        details[TOLD_BOOTSTRAP_PORT] = info.disaggregation_bootstrap_port
    return Facts(
        role=role,
        can_serve_alone=role is Role.BOTH,
        block_tokens=info.page_size,
        kv_capacity_tokens=info.max_total_num_tokens and info.max_total_num_tokens * info.dp_size,
        max_model_tokens=info.context_length,
        details=details,
    )


def _decode(body: bytes, kind: type[_T], what: str) -> _T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedEngineData(f"The {what} is not sound: {error}.") from None


def _of_loads(told: _Loads) -> Facts:
    capacity = _total([load.max_total_num_tokens for load in told.loads]) or None
    report = Report(
        running_count=sum(load.num_running_reqs + load.in_flight_count for load in told.loads),
        waiting_count=sum(load.num_waiting_reqs for load in told.loads),
        kv_usage_ratio=_ratio(_total([load.num_used_tokens for load in told.loads]), capacity),
        waiting_uncached_tokens=_total([load.num_waiting_uncached_tokens for load in told.loads]),
        gen_tokens_per_s=_rate([load.gen_throughput for load in told.loads]),
    )
    return Facts(report=report, kv_capacity_tokens=capacity)


def _of_metrics(body: bytes) -> Facts:
    """Only counts are summed, over ranks; of a metric split by priority the series without one is the whole."""
    found: dict[str, list[float]] = defaultdict(list)
    for sample in samples(body, _METRICS):
        if not sample.labels.get("priority"):
            found[sample.name].append(sample.value)
    if not found[RUNNING] or not found[QUEUED]:
        raise MalformedEngineData(f"The metrics lack {QUEUED if found[RUNNING] else RUNNING}.")
    capacity = _sum(found, CAPACITY) or None
    report = Report(
        running_count=(_sum(found, RUNNING) or 0) + (_sum(found, IN_FLIGHT) or 0),
        waiting_count=sum(_sum(found, name) or 0 for name in (QUEUED, *ON_THE_WAY)),
        kv_usage_ratio=_ratio(_sum(found, USED_TOKENS), capacity),
        prefix_hit_tokens=_sum(found, CACHED_TOKENS),
        prefix_query_tokens=_sum(found, PROMPT_TOKENS),
        gen_tokens_per_s=_rate(list(found[THROUGHPUT])),
    )
    return Facts(report=report, kv_capacity_tokens=capacity)


def _sum(found: Mapping[str, list[float]], name: str) -> int | None:
    """The sum over ranks; None when there is no such sample."""
    values = found.get(name)
    if not values:
        return None
    total = sum(values)
    if not math.isfinite(total) or any(value < 0 for value in values):
        raise MalformedEngineData(f"The metric {name} is not a count.")
    return round(total)


def _total(values: list[int | None]) -> int | None:
    """The sum over ranks; None when one does not say."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _rate(values: list[float | None]) -> float | None:
    """The sum over ranks, >= 0; None when one does not say."""
    known = [value for value in values if value is not None and math.isfinite(value) and value >= 0]
    return sum(known) if known and len(known) == len(values) else None


def _ratio(used: int | None, capacity: int | None) -> float | None:
    """Used over capacity, 0 <= ratio <= 1: an engine counts a page that is being freed in both."""
    return None if used is None or not capacity else min(1.0, used / capacity)
