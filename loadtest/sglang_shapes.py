"""The JSON that SGLang 0.5.23 answers: same fields, same order, same nulls. Pure.

Source: entrypoints/openai/{serving_chat,serving_completions}.py, managers/load_snapshot.py, and recorded answers.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from gateway.core.types import Role
from loadtest.engine import Engine
from loadtest.sglang_requests import SglangError, SglangGeneration
from loadtest.vllm_shapes import DONE, Choice, sse

VERSION = "0.5.23"
MODES = {Role.PREFILL: "prefill", Role.DECODE: "decode", Role.BOTH: "null"}

__all__ = ["DONE", "Choice"]


def error_event(error: SglangError) -> bytes:
    """A failure under HTTP 200."""
    return sse({"error": error.body() | {"type": "INTERNAL_SERVER_ERROR"}})


@dataclass(frozen=True, slots=True)
class SglangShapes:
    """The bodies of one request's answer."""

    generation: SglangGeneration
    created: int

    def first_chunk(self) -> bytes:
        """What a chat stream opens with when the first output arrives: the role."""
        return self._chat_chunk({"reasoning_content": None, "role": "assistant", "content": ""}, None, None)

    def chunks(self, choice: Choice, text: str) -> list[bytes]:
        """One step; in a chat the end has a chunk of its own."""
        if not self.generation.is_chat:
            body = self._head("text_completion")
            body["choices"] = [self._choice(choice.finish_reason, choice.stop_reason, {"text": text})]
            return [sse(body | {"usage": None})]
        said = [self._chat_chunk({"reasoning_content": None, "content": text}, None, None)] if text else []
        if choice.is_over:
            said.append(self._chat_chunk({"reasoning_content": None}, choice.finish_reason, choice.stop_reason))
        return said

    def usage_chunk(self, choice: Choice, cached_tokens: int) -> bytes:
        """The extra chunk that `stream_options.include_usage` asks for."""
        body = self._head("chat.completion.chunk" if self.generation.is_chat else "text_completion")
        body["choices"] = []
        counts = self._usage(choice, cached_tokens)
        if not self.generation.is_chat:
            del counts["completion_tokens_details"]
        return sse(body | {"usage": counts})

    def whole(self, choice: Choice, cached_tokens: int) -> bytes:
        """The answer of a request that does not stream."""
        body = self._head("chat.completion" if self.generation.is_chat else "text_completion")
        message = {"role": "assistant", "content": choice.text, "reasoning_content": None}
        own: dict[str, object] = {"message": message} if self.generation.is_chat else {"text": choice.text}
        body["choices"] = [self._choice(choice.finish_reason, choice.stop_reason, own)]
        body["usage"] = self._usage(choice, cached_tokens)
        span = {"version": "default", "start": 0, "end": len(choice.token_ids)}
        body["metadata"] = {"weight_version": "default", "weight_versions": [span]}
        return msgspec.json.encode(body)

    def _head(self, kind: str) -> dict[str, object]:
        return {"id": self.generation.rid, "object": kind, "created": self.created, "model": self.generation.model}

    def _chat_chunk(self, delta: dict[str, object], finish_reason: str | None, stop_reason: str | None) -> bytes:
        body = self._head("chat.completion.chunk")
        return sse(body | {"choices": [self._choice(finish_reason, stop_reason, {"delta": delta})]})

    def _choice(self, finish_reason: str | None, stop: str | None, own: dict[str, object]) -> dict[str, object]:
        return {"index": 0, **own, "logprobs": None, "finish_reason": finish_reason, "matched_stop": stop}

    def _usage(self, choice: Choice, cached_tokens: int) -> dict[str, object]:
        prompt, output = len(choice.prompt), len(choice.token_ids)
        return {
            "prompt_tokens": prompt,
            "total_tokens": prompt + output,
            "completion_tokens": output,
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
            "reasoning_tokens": 0,
            "completion_tokens_details": None,
        }


@dataclass(frozen=True, slots=True)
class Waiting:
    """Requests that wait for the other engine, which the engine model knows nothing of, and memory taken for them."""

    count: int
    tokens: int


def loads(engine: Engine, waiting: Waiting, now: float) -> dict[str, object]:
    """What `/v1/loads` tells. A decode engine takes memory before the KV comes, a prefill engine when it computes."""
    settings, load = engine.settings, engine.load()
    capacity = settings.kv_blocks * settings.block_tokens
    is_decode = settings.role is Role.DECODE
    used = round(load.kv_usage_ratio * capacity) + (waiting.tokens if is_decode else 0)
    in_flight = load.held_count if settings.role is Role.PREFILL else 0
    on_the_way = waiting.count + load.deferred_count
    told = {
        "timestamp": now,
        "dp_rank": 0,
        "num_running_reqs": load.running_count,
        "num_waiting_reqs": load.waiting_count + on_the_way,
        "num_waiting_uncached_tokens": 0,
        "num_used_tokens": used,
        "num_total_tokens": used + (0 if is_decode else waiting.tokens),
        "num_active_tokens": used,
        "num_prealloc_ready_tokens": 0,
        "max_total_num_tokens": capacity,
        "max_running_requests": settings.batch_limit,
        "token_usage": used / capacity,
        "gen_throughput": 0.0,
        "cache_hit_rate": 0.0,
        "utilization": 0.0,
        "total_prefill_uncached_tokens": engine.counters.computed_prompt_tokens,
        "total_prefill_busy_us": round(engine.counters.busy_s * 1e6),
        "decode_moments": [0.0] * 6 if is_decode else None,
        "memory": {"weight_gb": 0.0, "kv_cache_gb": 0.0, "graph_gb": 0.0, "token_capacity": capacity},
        "disaggregation": {
            "mode": MODES[settings.role],
            "prefill_bootstrap_queue_reqs": 0 if is_decode else on_the_way,
            "prefill_inflight_queue_reqs": in_flight,
            "decode_prealloc_queue_reqs": 0,
            "decode_transfer_queue_reqs": on_the_way if is_decode else 0,
            "decode_retracted_queue_reqs": 0,
            "kv_transfer_speed_gb_s": 0.0,
            "kv_transfer_latency_ms": 0.0,
        },
        "queues": {"waiting": load.waiting_count, "grammar": 0, "paused": 0, "retracted": 0, "prealloc_ready": 0},
    }
    head = {"timestamp": "2026-01-01T00:00:00+00:00", "version": VERSION, "accelerator": None, "num_accelerators": 1}
    return head | {"loads": [told]}


def server_info(
    engine: Engine, model: str, bootstrap_port: int, kv_events: dict[str, object] | None
) -> dict[str, object]:
    """Of `/server_info` what somebody reads."""
    settings = engine.settings
    return {
        "disaggregation_mode": MODES[settings.role],
        "disaggregation_transfer_backend": "mooncake",
        "disaggregation_bootstrap_port": bootstrap_port,
        "page_size": settings.block_tokens,
        "max_total_num_tokens": settings.kv_blocks * settings.block_tokens,
        "context_length": settings.max_model_tokens,
        "dp_size": 1,
        "tp_size": 1,
        "kv_events": kv_events,
        "version": VERSION,
        "enable_priority_scheduling": False,
        "schedule_low_priority_values_first": False,
        "served_model_name": model,
    }


def models(model: str, longest: int, created: int) -> dict[str, object]:
    """The model list."""
    card = {"id": model, "object": "model", "created": created, "owned_by": "sglang", "root": model, "parent": None}
    return {"object": "list", "data": [card | {"max_model_len": longest}]}
