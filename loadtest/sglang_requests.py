"""SGLang's generation bodies -> one sequence for the engine, or the error SGLang would answer. Pure.

Source: sglang 0.5.23, entrypoints/openai/{protocol,serving_chat,serving_completions}.py, managers/scheduler.py, and the
answers of a real engine in tests/recorded/sglang-0.5.23.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from loadtest import tokenizer
from loadtest.engine_types import EngineRequest, RemoteKv

COMPLETION_TOKENS = 16
"""Output tokens of a completion that does not say."""


class SglangError(Exception):
    """An error in SGLang's words: flat, `{"object": "error", "message", "type", "param", "code"}`."""

    def __init__(self, message: str, *, kind: str = "BadRequestError", status: int = 400) -> None:
        super().__init__(message)
        self.message, self.kind, self.status = message, kind, status

    def body(self) -> dict[str, object]:
        """The JSON body."""
        return {"object": "error", "message": self.message, "type": self.kind, "param": None, "code": self.status}


class Deadly(Exception):
    """A request that ends the scheduler, and with it the server."""


class _Options(msgspec.Struct):
    include_usage: bool | None = None


class _Body(msgspec.Struct):
    model: str = "default"
    messages: list[dict[str, Any]] | None = None
    prompt: str | list[int] | None = None
    input_ids: list[int] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stream: bool = False
    stream_options: _Options | None = None
    temperature: float = 1.0
    ignore_eos: bool = False
    stop: str | list[str] | None = None
    rid: Any = None
    routed_dp_rank: int | None = None
    bootstrap_host: Any = None
    bootstrap_port: Any = None
    bootstrap_room: Any = None


@dataclass(frozen=True, slots=True)
class Room:
    """Where the legs of a hand-off meet."""

    host: str
    port: int
    number: int


@dataclass(frozen=True, slots=True)
class SglangGeneration:
    """One validated request: its prompt as token ids and how to answer it."""

    is_chat: bool
    model: str
    prompt: tuple[int, ...]
    max_tokens: int
    is_stream: bool
    includes_usage: bool
    stop: tuple[str, ...]
    is_sampled: bool
    is_eos_ignored: bool
    rid: str
    room: Room | None

    def sequence(self, *, is_kv_held: bool = False, remote: RemoteKv | None = None) -> EngineRequest:
        """The engine's part; one token of it where the KV is held for the decode engine."""
        return EngineRequest(
            id=self.rid,
            prompt_tokens=len(self.prompt),
            max_tokens=1 if is_kv_held else self.max_tokens,
            token_ids=self.prompt,
            is_eos_ignored=self.is_eos_ignored,
            variant=int(self.is_sampled),
            is_kv_held=is_kv_held,
            remote=remote,
        )


def parse(body: bytes, *, is_chat: bool, longest: int, is_disaggregated: bool, rid: str) -> SglangGeneration:
    """A validated generation request; `rid` names it where it has no id of its own. Raises SglangError or Deadly."""
    try:
        request = msgspec.json.decode(body, type=_Body)
    except msgspec.DecodeError as error:
        raise SglangError(f"1 validation error:\n  {error}", kind="Bad Request") from error
    _check_routing(request)
    prompt = _prompt(request, is_chat)
    options = request.stream_options or _Options()
    rid = request.rid or rid
    return SglangGeneration(
        is_chat=is_chat,
        model=request.model,
        prompt=prompt,
        max_tokens=_limit(request, len(prompt), longest, is_chat),
        is_stream=request.stream,
        includes_usage=bool(request.stream and options.include_usage),
        stop=(request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ()),
        is_sampled=request.temperature != 0,
        is_eos_ignored=request.ignore_eos,
        rid=rid,
        room=_room(request, rid) if is_disaggregated else None,
    )


def _check_routing(request: _Body) -> None:
    if isinstance(request.rid, list):
        message = "Internal server error: unhashable type: 'list'"
        raise SglangError(message, kind="InternalServerError", status=500)
    if request.routed_dp_rank not in (None, 0):
        raise SglangError(f"routed_dp_rank={request.routed_dp_rank} out of range [0, 1)")


def _prompt(request: _Body, is_chat: bool) -> tuple[int, ...]:
    if is_chat and not request.messages:
        raise SglangError("Messages cannot be empty.")
    if is_chat and request.input_ids is not None:
        ids = request.input_ids
    elif is_chat:
        ids = tokenizer.encode_chat(request.messages or [])
    else:
        ids = request.prompt if isinstance(request.prompt, list) else tokenizer.encode(request.prompt or "")
    if any(token < 0 for token in ids):
        raise Deadly("a token id below 0")  # the embedding is looked up out of its range
    if not ids:
        raise SglangError("Prompt cannot be empty")
    return tuple(ids)


def _limit(request: _Body, prompt_tokens: int, longest: int, is_chat: bool) -> int:
    """Output tokens; raises as SGLang does for lengths and bounds that cannot be."""
    asked = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    if asked is None and not is_chat:
        asked = COMPLETION_TOKENS
    if asked is not None and asked > longest and is_chat:
        raise SglangError(
            f"max_completion_tokens is too large: {asked}.This model supports at most {longest} completion tokens."
        )
    if prompt_tokens >= longest:
        raise SglangError(
            f"The input ({prompt_tokens} tokens) is longer than the model's context length ({longest} tokens)."
        )
    if asked is not None and asked < 0:
        raise SglangError(f"max_new_tokens must be at least 0, got {asked}.")
    room = longest - prompt_tokens
    return room if asked is None else max(1, min(asked, room))


def _room(request: _Body, rid: str) -> Room:
    values = (request.bootstrap_host, request.bootstrap_port, request.bootstrap_room)
    if request.bootstrap_room is None:
        raise SglangError(f"Invalid request: Disaggregated request received without bootstrap room id. req.rid={rid!r}")
    if any(isinstance(value, list) for value in values):
        raise Deadly("a list where a single request has one value")
    return Room(str(request.bootstrap_host), int(request.bootstrap_port or 8998), int(request.bootstrap_room))
