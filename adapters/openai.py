"""What a client sends on the OpenAI routes: bytes in, one checked `Payload` out.

The body is decoded once into a dict, the few fields that routing needs are checked with their types, and everything
else passes through untouched: engines know their own parameters better than a gateway does. The engines never see the
client's bytes, only this dict encoded anew, so tricks with duplicate keys end here (the last one counts).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Final, TypeVar

import msgspec
from msgspec import Meta, Struct

from adapters.base import Payload
from adapters.body import decode, strip
from adapters.headers import forwarded
from gateway.core.errors import BadRequest

CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"

COMPLETIONS_MAX_TOKENS: Final = 16
"""Output tokens of a completion that does not say. Source: vllm/entrypoints/openai/completion/protocol.py (0.32.0)."""

_Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
_TokenId = Annotated[int, Meta(ge=0, le=2**63 - 1)]
_Prompt = str | list[str | _TokenId | list[_TokenId]]


class _Fields(Struct):
    """What routing reads on every generating route."""

    model: str
    stream: bool | None = None
    max_tokens: _Count | None = None
    n: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    best_of: int | None = None
    stream_options: dict[str, Any] | None = None
    use_beam_search: Any = None
    echo: Any = None
    logprobs: Any = None
    top_logprobs: Any = None
    prompt_logprobs: Any = None


class _Chat(_Fields, kw_only=True):
    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    max_completion_tokens: _Count | None = None
    tools: Any = None


class _Completion(_Fields, kw_only=True):
    prompt: _Prompt | None = None
    prompt_embeds: Any = None


class _PassThrough(Struct):
    """What routing reads on routes that go to one engine as they are."""

    model: str | None = None
    stream: bool | None = None
    max_tokens: Any = None
    max_output_tokens: Any = None


_F = TypeVar("_F", bound=Struct)


def parse(
    path: str,
    raw: bytes,
    headers: Sequence[tuple[str, str]] = (),
    *,
    request_id: str,
    strips_cache_salt: bool = False,
) -> Payload:
    """The client's request, checked and stripped of routing-internal fields and headers.

    `request_id` is ours and the only one engines see. Raises BadRequest, with the field at fault in `param`.
    """
    body = decode(raw)
    strip(body, strips_cache_salt)
    if body.get("lora_path") is not None:  # it would say what `model` says, unseen by routing
        raise BadRequest("`lora_path` is not taken: name the adapter in `model`.", param="lora_path")
    facts = _FACTS.get(path, _pass_through_facts)(body, raw)
    return Payload(
        request_id=request_id, path=path, body=body, body_bytes=len(raw), headers=forwarded(headers), **facts
    )


def _chat_facts(body: dict[str, object], raw: bytes) -> dict[str, Any]:
    fields = _convert(body, _Chat)
    limit = fields.max_tokens if fields.max_completion_tokens is None else fields.max_completion_tokens
    if limit == 0:
        name = "max_tokens" if fields.max_completion_tokens is None else "max_completion_tokens"
        raise BadRequest(f"`{name}` must be at least 1.", param=name)
    return {
        "model": _model(fields.model),
        "is_stream": bool(fields.stream),
        "prompt_chars": sum(map(_message_chars, fields.messages)) + _json_chars(fields.tools),
        "max_output_tokens": limit,
        "can_hand_off": _can_hand_off(fields),
    }


def _completion_facts(body: dict[str, object], raw: bytes) -> dict[str, Any]:
    fields = _convert(body, _Completion)
    if fields.max_tokens == 0 and not fields.echo:
        raise BadRequest("`max_tokens` must be at least 1 (0 only with `echo`).", param="max_tokens")
    has_embeds = fields.prompt_embeds is not None
    if fields.prompt is None and not has_embeds:
        raise BadRequest("`prompt` is missing.", param="prompt")
    prompts = _prompts(fields.prompt)
    is_text = all(isinstance(prompt, str) for prompt in prompts)
    size = sum(map(len, prompts))
    return {
        "model": _model(fields.model),
        "is_stream": bool(fields.stream),
        "prompt_chars": size if is_text else 0,
        "prompt_tokens": None if is_text else size,
        "max_output_tokens": COMPLETIONS_MAX_TOKENS if fields.max_tokens is None else fields.max_tokens,
        "can_hand_off": len(prompts) == 1 and not has_embeds and fields.max_tokens != 0 and _can_hand_off(fields),
    }


def _pass_through_facts(body: dict[str, object], raw: bytes) -> dict[str, Any]:
    fields = _convert(body, _PassThrough)
    limit = fields.max_tokens if fields.max_output_tokens is None else fields.max_output_tokens
    return {
        "model": None if fields.model is None else _model(fields.model),
        "is_stream": bool(fields.stream),
        "prompt_chars": len(raw),
        "max_output_tokens": limit if type(limit) is int and limit >= 1 else None,
    }


_FACTS: Final = {CHAT: _chat_facts, COMPLETIONS: _completion_facts}


def _convert(body: dict[str, object], kind: type[_F]) -> _F:
    try:
        return msgspec.convert(body, kind)
    except msgspec.ValidationError as error:
        message = str(error)
    found = re.search(r"(?: - at `\$\.(.+)`$)|(?:required field `(.+)`)", message)
    param = (found[1] or found[2]) if found else None
    what = message.partition(" - at ")[0]
    raise BadRequest(f"`{param}`: {what}." if param else f"{what}.", param=param)


def _model(model: str) -> str:
    if not model:
        raise BadRequest("`model` must not be empty.", param="model")
    return model


def _prompts(prompt: _Prompt | None) -> Sequence[str | list[int]]:
    """The prompts, each a text or a list of token ids; raises BadRequest when one is empty or their kinds differ."""
    if prompt is None:
        return []
    prompts: Any = [prompt] if isinstance(prompt, str) or {type(item) for item in prompt} == {int} else prompt
    if not prompts or not all(prompts):
        raise BadRequest("`prompt` must not be empty.", param="prompt")
    if len({type(item) for item in prompts}) > 1 or isinstance(prompts[0], int):
        raise BadRequest("`prompt` must hold only texts, only token ids, or only lists of token ids.", param="prompt")
    return prompts  # type: ignore[no-any-return]


def _can_hand_off(fields: _Fields) -> bool:
    """Whether a prefill with one output token computes the KV this request needs, for one reader.

    Several choices would read one prefill's blocks several times, and the first reader frees them. Prompt logprobs make
    the decode engine compute the whole prompt again, and `echo` with logprobs asks for them.
    """
    has_logprobs = fields.logprobs is not None or fields.top_logprobs is not None
    reads_prompt = fields.prompt_logprobs is not None or (bool(fields.echo) and has_logprobs)
    has_one_choice = fields.n in (None, 1) and fields.best_of in (None, 0, 1) and not fields.use_beam_search
    return has_one_choice and not reads_prompt


def _message_chars(message: dict[str, Any]) -> int:
    """Characters of text in one chat message; media parts count nothing."""
    content = message.get("content")
    chars = len(content) if isinstance(content, str) else 0
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) else part for part in content]
        chars = sum(len(text) for text in texts if isinstance(text, str))
    return chars + _json_chars(message.get("tool_calls"))


def _json_chars(value: object) -> int:
    return len(msgspec.json.encode(value)) if value else 0
