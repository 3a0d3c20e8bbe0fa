"""The JSON that vLLM 0.32.0 answers: same fields, same order, same nulls. Pure.

Stream chunks carry exactly the fields vLLM sets (pydantic's `exclude_unset`): that is why some nulls are there and
others are not. Source: entrypoints/openai/{chat_completion,completion}/{serving,protocol}.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from loadtest import tokenizer
from loadtest.engine_types import EngineSettings, HeldKv
from loadtest.vllm_requests import Generation

VERSION = "0.32.0"
FINGERPRINT = f"vllm-{VERSION}-5106ce00"
"""`vllm-<version>-<8 hex digits of the config>`."""
DONE = b"data: [DONE]\n\n"


@dataclass(slots=True)
class Choice:
    """What one choice has said so far."""

    index: int
    prompt: tuple[int, ...]
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | None = None
    _unsaid: str = ""

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to be said."""
        return self.finish_reason is not None

    def hear(self, token_ids: Sequence[int], finish_reason: str | None, stops: Sequence[str]) -> str:
        """Takes tokens from the engine; the text to show now. Text that may begin a stop string is kept back."""
        self.token_ids += token_ids
        self._unsaid += tokenizer.decode(token_ids)
        self.finish_reason = finish_reason
        shown = len(self._unsaid)
        found = min(((at, stop) for stop in stops if (at := self._unsaid.find(stop)) >= 0), default=None)
        if found is not None:
            shown, self.stop_reason = found
            self.finish_reason = "stop"
        elif finish_reason is None and stops:
            shown = max(0, shown - max(map(len, stops)) + 1)
        delta, self._unsaid = self._unsaid[:shown], self._unsaid[shown:]
        self.text += delta
        return delta


def sse(body: object) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, object]:
    """The usage object as the last chunk of a stream has it."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "total_tokens": total, "completion_tokens": completion_tokens}


def error_event() -> bytes:
    """A failure in the middle of a stream; vLLM encodes it with other spaces than the chunks."""
    error = {"message": "Internal server error", "type": "InternalServerError", "param": None, "code": 500}
    return f"data: {json.dumps({'error': error})}\n\n".encode()


@dataclass(frozen=True, slots=True)
class Shapes:
    """The bodies of one request's answer."""

    generation: Generation
    id: str
    created: int

    def first_chunks(self) -> list[bytes]:
        """What a chat stream opens with when the first output arrives: the role, once per choice."""
        if not self.generation.is_chat:
            return []
        return [sse(self._role_chunk(index)) for index in range(self.generation.choices)]

    def chunk(self, choice: Choice, text: str, token_ids: Sequence[int]) -> bytes:
        """One step of one choice; the last one when the choice has a finish reason."""
        body = self._head("chat.completion.chunk" if self.generation.is_chat else "text_completion")
        ids = list(token_ids) if self.generation.returns_token_ids else None
        is_last = choice.finish_reason is not None
        if self.generation.is_chat:
            entry: dict[str, object] = {"index": choice.index, "delta": {"content": text}, "logprobs": None}
            entry["finish_reason"] = choice.finish_reason
            if is_last:
                entry["stop_reason"] = choice.stop_reason
        else:
            is_first = len(choice.token_ids) == len(token_ids)
            shows_prompt = self.generation.returns_token_ids and is_first
            entry = {"index": choice.index, "text": text, "logprobs": None, "finish_reason": choice.finish_reason}
            entry["stop_reason"] = choice.stop_reason
            entry["prompt_token_ids"] = list(choice.prompt) if shows_prompt else None
        entry["token_ids"] = ids
        body["choices"] = [entry]
        if self.generation.has_continuous_usage:
            body["usage"] = self._running_usage(choice)
        if is_last and not self.generation.includes_usage:
            body["system_fingerprint"] = FINGERPRINT
        return sse(body)

    def usage_chunk(self, choices: Sequence[Choice], cached: int | None) -> bytes:
        """The extra chunk that `stream_options.include_usage` asks for."""
        body = self._head("chat.completion.chunk" if self.generation.is_chat else "text_completion")
        body["choices"] = []
        counts = usage(self._prompt_tokens(), sum(len(c.token_ids) for c in choices))
        if cached is not None:
            details = {"cached_tokens": cached}
            counts["prompt_tokens_details"] = details | ({"created_cache_tokens": 0} if self.generation.is_chat else {})
        body["usage"] = counts
        body["system_fingerprint"] = FINGERPRINT
        return sse(body)

    def whole(self, choices: Sequence[Choice], kv_params: dict[str, object] | None, cached: int | None) -> bytes:
        """The answer of a request that does not stream; every field of vLLM's response type, nulls included."""
        body = self._head("chat.completion" if self.generation.is_chat else "text_completion")
        body["choices"] = [self._chat_choice(c) if self.generation.is_chat else self._choice(c) for c in choices]
        details = None
        if cached is not None:
            created = 0 if self.generation.is_chat else None
            details = {"cached_tokens": cached, "created_cache_tokens": created, "multimodal_tokens": None}
        counts = usage(self._prompt_tokens(), sum(len(c.token_ids) for c in choices))
        body |= {
            "service_tier": None,
            "system_fingerprint": FINGERPRINT,
            "usage": counts | {"prompt_tokens_details": details, "completion_tokens_details": None},
        }
        if self.generation.is_chat:
            prompt = list(self.generation.prompts[0]) if self.generation.returns_token_ids else None
            body |= {"prompt_logprobs": None, "prompt_token_ids": prompt, "prompt_text": None}
        body |= {"kv_transfer_params": kv_params, "ec_transfer_params": None, "metrics": None}
        return msgspec.json.encode(body)

    def _head(self, kind: str) -> dict[str, object]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.generation.model}

    def _prompt_tokens(self) -> int:
        return sum(map(len, self.generation.prompts))

    def _role_chunk(self, index: int) -> dict[str, object]:
        body = self._head("chat.completion.chunk")
        delta = {"role": "assistant", "content": ""}
        body["choices"] = [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]
        if self.generation.has_continuous_usage:
            body["usage"] = usage(self._prompt_tokens(), 0) | {"completion_tokens_details": None}
        prompt = list(self.generation.prompts[0]) if self.generation.returns_token_ids else None
        return body | {"prompt_token_ids": prompt, "prompt_text": None}

    def _running_usage(self, choice: Choice) -> dict[str, object]:
        counts = usage(len(choice.prompt), len(choice.token_ids))
        return counts | {"completion_tokens_details": None} if self.generation.is_chat else counts

    def _chat_choice(self, choice: Choice) -> dict[str, object]:
        message = {
            "role": "assistant",
            "content": choice.text,
            "refusal": None,
            "annotations": None,
            "audio": None,
            "function_call": None,
            "reasoning": None,
        }
        return {
            "index": choice.index,
            "message": message,
            "logprobs": None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            "token_ids": choice.token_ids if self.generation.returns_token_ids else None,
            "routed_experts": None,
        }

    def _choice(self, choice: Choice) -> dict[str, object]:
        shows_ids = self.generation.returns_token_ids
        return {
            "index": choice.index,
            "text": choice.text,
            "logprobs": None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            "token_ids": choice.token_ids if shows_ids else None,
            "prompt_logprobs": None,
            "prompt_token_ids": list(choice.prompt) if shows_ids else None,
            "routed_experts": None,
        }


def kv_params(held: HeldKv, engine_id: str, host: str, port: int) -> dict[str, object]:
    """What a prefill leg answers for the decode leg. Source: nixl/pull_scheduler.py, request_finished."""
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_block_ids": [list(held.block_ids)],
        "remote_engine_id": engine_id,
        "remote_request_id": held.request_id,
        "remote_host": host,
        "remote_port": port,
        "tp_size": 1,
        "dcp_size": 1,
        "pp_size": 1,
        "remote_num_tokens": held.tokens,
        "remote_blocks_expiry_time": None,
        "transfer_mode": "pull",
        "remote_prefill_cached_tokens": held.cached_tokens,
    }


def models(names: Sequence[str], settings: EngineSettings, created: int) -> dict[str, object]:
    """The model list: the base model first, adapters with `parent`."""
    base = names[0]
    permission = {
        "id": f"modelperm-{base}",
        "object": "model_permission",
        "created": created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    cards = [
        {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "vllm",
            "root": name,
            "parent": None if name == base else base,
            "max_model_len": settings.max_model_tokens if name == base else None,
            "permission": [permission],
        }
        for name in names
    ]
    return {"object": "list", "data": cards}
