"""vLLM's generation bodies -> sequences for the engine, or the error vLLM would answer. Pure.

Source: vllm 0.32.0 entrypoints/openai/{chat_completion,completion}/{protocol,serving}.py, renderers/params.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from loadtest import tokenizer
from loadtest.engine_types import EngineRequest, RemoteKv

_T = TypeVar("_T")

MAX_CHOICES = 16384
"""VLLM_MAX_N_SEQUENCES's default."""


class VllmError(Exception):
    """An error in vLLM's words: `{"error": {"message", "type", "param", "code"}}`."""

    def __init__(
        self, message: str, *, kind: str = "BadRequestError", status: int = 400, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.kind, self.status, self.param = message, kind, status, param

    def body(self) -> dict[str, object]:
        """The JSON body."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.status}
        return {"error": error}


def refused(message: str, param: str, value: object = None) -> VllmError:
    """What vLLM answers when a parameter's value cannot be (its VLLMValidationError)."""
    tail = "" if value is None else f", value={value}"
    return VllmError(f"{message} (parameter={param}{tail})", param=param)


def invalid_field(message: str, param: str | None = None) -> VllmError:
    """What vLLM answers when the body itself does not validate (pydantic's stage)."""
    return VllmError(f"1 validation error:\n  {message}", kind="Bad Request", param=param)


def _undecodable(body: bytes, error: msgspec.DecodeError) -> VllmError:
    if isinstance(error, msgspec.ValidationError):
        where = re.search(r"\$\.([\w.]+)", str(error))
        return invalid_field(str(error), f"body.{where.group(1)}" if where else None)
    try:
        json.loads(body)
    except json.JSONDecodeError as cause:
        loc = f"body.{cause.pos}"
        detail = {"type": "json_invalid", "loc": loc, "msg": "JSON decode error", "input": "<dict of 0 items>"}
        return invalid_field(str(detail | {"ctx": {"error": cause.msg}}), loc)
    return invalid_field(str(error))


def decoded(body: bytes, kind: type[_T]) -> _T:
    """The JSON body as that type. Raises VllmError."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError as error:
        raise _undecodable(body, error) from error


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class _Common(msgspec.Struct):
    model: str | None = None
    max_tokens: int | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    stop: str | list[str] | None = None
    min_tokens: int = 0
    temperature: float | None = None
    ignore_eos: bool = False
    cache_salt: str | None = None
    return_token_ids: bool | None = None
    kv_transfer_params: dict[str, Any] | None = None
    request_id: str | None = None
    logprobs: bool | int | None = None
    echo: bool = False


class _Chat(_Common):
    messages: list[dict[str, Any]] | msgspec.UnsetType = msgspec.UNSET
    max_completion_tokens: int | None = None
    continue_final_message: bool = False
    add_generation_prompt: bool = True


class _Completion(_Common):
    prompt: str | list[str | int | list[int]] | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """What the engine serves: names and sizes."""

    model: str
    loras: tuple[str, ...]
    max_model_tokens: int


@dataclass(frozen=True, slots=True)
class Generation:
    """One validated request: its prompts as token ids and how to answer it."""

    is_chat: bool
    model: str
    prompts: tuple[tuple[int, ...], ...]
    max_tokens: tuple[int, ...]
    """Per prompt."""
    choices: int = 1
    is_stream: bool = False
    includes_usage: bool = False
    has_continuous_usage: bool = False
    stop: tuple[str, ...] = ()
    min_tokens: int = 0
    is_sampled: bool = True
    is_eos_ignored: bool = False
    lora: str = ""
    salt: str = ""
    returns_token_ids: bool = False
    body_request_id: str | None = None
    kv_params: Mapping[str, Any] = field(default_factory=dict)

    @property
    def wants_hold(self) -> bool:
        """Whether it is the prefill leg of a hand-off."""
        return bool(self.kv_params.get("do_remote_decode"))

    def engine_requests(self, ids: list[str], remote: RemoteKv | None) -> list[EngineRequest]:
        """The sequences, `choices` per prompt, in choice order; `ids` names them, `remote` is where their KV lies."""
        requests: list[EngineRequest] = []
        for position, prompt in enumerate(self.prompts):
            for choice in range(self.choices):
                requests.append(
                    EngineRequest(
                        id=ids[len(requests)],
                        prompt_tokens=len(prompt),
                        max_tokens=self.max_tokens[position],
                        token_ids=prompt,
                        lora=self.lora,
                        salt=self.salt,
                        is_eos_ignored=self.is_eos_ignored,
                        min_tokens=self.min_tokens,
                        variant=choice if self.is_sampled else 0,
                        is_kv_held=self.wants_hold,
                        remote=remote,
                    )
                )
        return requests


class _Remote(msgspec.Struct):
    remote_block_ids: list[list[int] | int] | None = None
    remote_engine_id: str | None = None
    remote_request_id: str | None = None
    remote_host: str | None = None
    remote_port: int | None = None
    tp_size: int | None = None


def remote_kv(params: Mapping[str, Any]) -> RemoteKv | None:
    """Where the KV lies, from `kv_transfer_params`; None when they do not ask for a remote prefill.

    Block ids come as a list per KV-cache group (of which a plain model has one) or, from older engines, flat. Raises
    VllmError when a field has another type.
    """
    if not params.get("do_remote_prefill"):
        return None
    try:
        remote = msgspec.convert(dict(params), _Remote)
    except msgspec.ValidationError as error:
        raise invalid_field(str(error), "kv_transfer_params") from error
    groups = remote.remote_block_ids or []
    flat = [block for group in groups for block in (group if isinstance(group, list) else [group])]
    return RemoteKv(
        block_ids=tuple(flat),
        engine_id=remote.remote_engine_id,
        request_id=remote.remote_request_id,
        host=remote.remote_host,
        port=remote.remote_port,
        is_heartbeat_possible=remote.tp_size is not None,
    )


def parse(body: bytes, *, is_chat: bool, limits: Limits) -> Generation:
    """A validated generation request. Raises VllmError."""
    request = decoded(body, _Chat) if is_chat else decoded(body, _Completion)
    _check_body(request, body)
    lora = _lora(request.model, limits)
    prompts = _chat_prompt(request) if isinstance(request, _Chat) else _completion_prompts(request)
    options = request.stream_options or _StreamOptions()
    return Generation(
        is_chat=is_chat,
        model=request.model or limits.model,
        prompts=prompts,
        max_tokens=tuple(_output_limit(request, len(prompt), limits) for prompt in prompts),
        choices=request.n or 1,
        is_stream=bool(request.stream),
        includes_usage=bool(options.include_usage),
        has_continuous_usage=bool(options.include_usage and options.continuous_usage_stats),
        stop=(request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ()),
        min_tokens=request.min_tokens,
        is_sampled=request.temperature != 0,
        is_eos_ignored=request.ignore_eos,
        lora=lora,
        salt=request.cache_salt or "",
        returns_token_ids=bool(request.return_token_ids),
        body_request_id=request.request_id,
        kv_params=request.kv_transfer_params or {},
    )


def _check_body(request: _Chat | _Completion, body: bytes) -> None:
    if isinstance(request, _Chat) and request.messages is msgspec.UNSET:
        given = f"<dict of {len(decoded(body, dict[str, object]))} items>"
        detail = {"type": "missing", "loc": "body.messages", "msg": "Field required", "input": given}
        raise invalid_field(str(detail), "body.messages")
    if request.stream_options is not None and not request.stream:
        raise refused("Stream options can only be defined when `stream=True`.", "stream_options")
    if request.cache_salt is not None and (not request.cache_salt or set(request.cache_salt) & set("@/\\\0")):
        raise invalid_field("Parameter 'cache_salt' must be a non-empty string without '@', '/', '\\' and NUL.")
    if request.n is not None and not 1 <= request.n <= MAX_CHOICES:
        raise refused(f"n must be at least 1 and at most {MAX_CHOICES}, got {request.n}.", "n", request.n)
    if request.logprobs or request.echo:
        raise VllmError("This emulator does not serve logprobs or echo.")


def _lora(model: str | None, limits: Limits) -> str:
    if not model or model == limits.model:
        return ""
    if model in limits.loras:
        return model
    message = f"The model `{model}` does not exist. Valid aliases: {limits.model}."
    raise VllmError(message, kind="NotFoundError", status=404, param="model")


def _chat_prompt(request: _Chat) -> tuple[tuple[int, ...], ...]:
    ready = (request.kv_transfer_params or {}).get("prompt_token_ids")
    if ready:
        return (tuple(ready),)
    assert request.messages is not msgspec.UNSET, "checked before"
    if not request.messages:
        raise VllmError("Cannot apply chat template to an empty conversation. Provide at least one message.")
    if request.continue_final_message and request.add_generation_prompt:
        raise invalid_field("Cannot set both `continue_final_message` and `add_generation_prompt` to True.")
    return (tuple(tokenizer.encode_chat(request.messages, is_open=request.continue_final_message)),)


def _completion_prompts(request: _Completion) -> tuple[tuple[int, ...], ...]:
    if not request.prompt:
        raise refused("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")
    prompt = [request.prompt] if isinstance(request.prompt, str) else request.prompt
    numbers = [token for token in prompt if isinstance(token, int)]
    if numbers:
        if len(numbers) != len(prompt):
            raise invalid_field("prompt: a list of token ids holds only integers", "prompt")
        return (tuple(numbers),)
    return tuple(
        tuple(tokenizer.encode(p)) if isinstance(p, str) else tuple(p) for p in prompt if not isinstance(p, int)
    )


def _output_limit(request: _Chat | _Completion, prompt_tokens: int, limits: Limits) -> int:
    """How many tokens may come; raises as vLLM does for lengths and bounds that cannot be."""
    longest = limits.max_model_tokens
    if isinstance(request, _Chat):
        name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
        asked = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    else:
        name, asked = "max_tokens", 16 if request.max_tokens is None else request.max_tokens
    if asked is not None and asked > longest:
        message = f"{name}={asked} cannot be greater than max_model_len={longest}. Please request fewer output tokens."
        raise refused(message, name, asked)
    if prompt_tokens > longest:
        raise refused(
            f"This model's maximum context length is {longest} tokens. However, your prompt contains {prompt_tokens} "
            "input tokens, which exceeds this limit even without any output tokens. "
            "Please reduce the length of the input prompt.",
            "input_tokens",
            prompt_tokens,
        )
    if prompt_tokens < 1:
        raise VllmError("The decoder prompt cannot be empty")
    limit = longest - prompt_tokens if asked is None else min(asked, longest - prompt_tokens)
    if limit < 1:
        raise refused(f"max_tokens must be at least 1, got {limit}.", "max_tokens", limit)
    if request.min_tokens < 0 or request.min_tokens > limit:
        raise VllmError(f"min_tokens must be between 0 and max_tokens={limit}, got {request.min_tokens}.")
    return limit
