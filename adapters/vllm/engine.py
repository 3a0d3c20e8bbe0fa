"""What a vLLM engine says of itself: its metrics page and its model list, as facts.

With data parallelism one address fronts several engine cores, each with its own samples (label `engine`). Their counts
and capacities add up; the KV usage of the whole is the mean weighted by capacity, so that usage times capacity stays
the number of tokens held.

Source: vllm 0.32.0, v1/metrics/loggers.py and entrypoints/openai/models/protocol.py.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Annotated, Final, TypeAlias

import msgspec
from msgspec import Meta, Struct

from adapters.base import Facts
from adapters.prometheus import Sample, samples
from gateway.core.errors import MalformedEngineData
from gateway.core.types import Report, StageTimes

RUNNING: Final = "vllm:num_requests_running"
WAITING: Final = "vllm:num_requests_waiting"
KV_USAGE: Final = "vllm:kv_cache_usage_perc"
"""A ratio from 0 to 1, in spite of its name."""
PREFIX_HITS: Final = "vllm:prefix_cache_hits_total"
PREFIX_QUERIES: Final = "vllm:prefix_cache_queries_total"
PREEMPTIONS: Final = "vllm:num_preemptions_total"
PREFILL_TIME: Final = "vllm:request_prefill_time_seconds"
GAP: Final = "vllm:inter_token_latency_seconds"
PROMPT_TOKENS: Final = "vllm:prompt_tokens_by_source_total"
COMPUTED: Final = "local_compute"
"""The value of its label `source` for tokens that the engine computed itself."""
CACHE_CONFIG: Final = "vllm:cache_config_info"

_Cache: TypeAlias = tuple[int | None, int | None]
"""(tokens per KV block, KV blocks) of one engine core; None where it does not say."""

_TIMES: Final = tuple(f"{name}_{part}" for name in (PREFILL_TIME, GAP) for part in ("count", "sum"))
_WANTED: Final = (
    *(RUNNING, WAITING, KV_USAGE, PREFIX_HITS, PREFIX_QUERIES, PREEMPTIONS, PROMPT_TOKENS, CACHE_CONFIG),
    *_TIMES,
)


def parse_report(body: bytes) -> Facts:
    """Load, KV block size (tokens) and KV capacity (tokens) from the metrics page. Raises MalformedEngineData."""
    found: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples(body, _WANTED):
        found[sample.name].append(sample)
    blocks = {sample.labels.get("engine", "0"): _cache(sample.labels) for sample in found[CACHE_CONFIG]}
    report = Report(
        running_count=_required(found, RUNNING),
        waiting_count=_required(found, WAITING),
        kv_usage_ratio=_kv_usage(found[KV_USAGE], blocks),
        prefix_hit_tokens=_total(found, PREFIX_HITS),
        prefix_query_tokens=_total(found, PREFIX_QUERIES),
        preemptions=_total(found, PREEMPTIONS),
        times=_times(found),
    )
    return Facts(report=report, block_tokens=_block_tokens(blocks), kv_capacity_tokens=_capacity(blocks))


class _Model(Struct):
    id: Annotated[str, Meta(min_length=1)]
    max_model_len: Annotated[int, Meta(ge=1)] | None = None
    """Absent on adapters."""
    parent: str | None = None
    """The base model of a LoRA adapter."""


class _ModelList(Struct):
    data: list[_Model]


def parse_models(body: bytes) -> Facts:
    """Model names, LoRA adapters included, in the engine's order, and the longest context (tokens).

    Raises MalformedEngineData.
    """
    try:
        models = msgspec.json.decode(body, type=_ModelList).data
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedEngineData(f"The model list is not sound: {error}.") from None
    limits = [model.max_model_len for model in models if model.max_model_len is not None]
    return Facts(
        models=tuple(model.id for model in models),
        lora_names=tuple(model.id for model in models if model.parent is not None),
        max_model_tokens=max(limits, default=None),
    )


def _total(found: Mapping[str, list[Sample]], name: str) -> int | None:
    """The sum over engine cores; None when there is no such sample."""
    values = [sample.value for sample in found.get(name, ())]
    total = sum(values)
    if not math.isfinite(total) or any(value < 0 for value in values):
        raise MalformedEngineData(f"The metric {name} is not a count.")
    return round(total) if values else None


def _times(found: Mapping[str, list[Sample]]) -> StageTimes | None:
    """The engine's own account of its work; None from a version that does not keep it."""
    if any(name not in found for name in (PROMPT_TOKENS, *_TIMES)):
        return None
    computed = [sample for sample in found[PROMPT_TOKENS] if sample.labels.get("source") == COMPUTED]
    return StageTimes(
        prefill_count=_total(found, f"{PREFILL_TIME}_count") or 0,
        prefill_s=_sum(found, f"{PREFILL_TIME}_sum"),
        computed_tokens=_total({PROMPT_TOKENS: computed}, PROMPT_TOKENS) or 0,
        gap_count=_total(found, f"{GAP}_count") or 0,
        gap_s=_sum(found, f"{GAP}_sum"),
    )


def _sum(found: Mapping[str, list[Sample]], name: str) -> float:
    """Seconds over all engine cores, >= 0 and finite."""
    total = sum(sample.value for sample in found[name])
    if not 0 <= total < math.inf:
        raise MalformedEngineData(f"The metric {name} is not a time.")
    return total


def _required(found: Mapping[str, list[Sample]], name: str) -> int:
    total = _total(found, name)
    if total is None:
        raise MalformedEngineData(f"The metrics lack {name}.")
    return total


def _cache(labels: Mapping[str, str]) -> _Cache:
    return _number(labels.get("block_size", "")), _number(labels.get("num_gpu_blocks", ""))


def _number(label: str) -> int | None:
    """A positive count; None for what is none ("None" stands there before the engine has measured its memory)."""
    return int(label) or None if re.fullmatch(r"[0-9]{1,18}", label) else None


def _block_tokens(blocks: Mapping[str, _Cache]) -> int | None:
    """The block size that all engine cores share, else None."""
    sizes = {size for size, _ in blocks.values()}
    return sizes.pop() if len(sizes) == 1 else None


def _capacity(blocks: Mapping[str, _Cache]) -> int | None:
    """KV tokens that fit in all engine cores together; None when one does not say."""
    sizes = [size * count for size, count in blocks.values() if size and count]
    return sum(sizes) if sizes and len(sizes) == len(blocks) else None


def _kv_usage(usages: list[Sample], blocks: Mapping[str, _Cache]) -> float | None:
    """Mean usage weighted by each core's blocks, 0 <= ratio <= 1; equal weights where those are not known."""
    values = [sample.value for sample in usages]
    if not values or any(math.isnan(value) for value in values):
        return None
    if not all(0 <= value <= 1 for value in values):
        raise MalformedEngineData(f"The metric {KV_USAGE} is not a ratio.")
    counts = [blocks.get(sample.labels.get("engine", "0"), (None, None))[1] for sample in usages]
    weights = [count or 1 for count in counts] if all(counts) else [1] * len(values)
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)
