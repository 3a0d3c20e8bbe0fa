"""What an engine's response to a leg means: go on, commit, or end as the table of endings says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec
from msgspec import Struct

from adapters.base import Answer, Answered, Broken, Command, Commit, Happening, HeadEvent, Leg, Payload
from adapters.endings import State, ended
from gateway.core.types import Engine

JSON_HEADER: Final = ("Content-Type", "application/json")


class _Choice(Struct):
    delta: dict[str, Any] | None = None
    finish_reason: str | None = None


class _Event(Struct):
    error: Any = None
    choices: list[_Choice] = []


_EVENT: Final = msgspec.json.Decoder(_Event)


def leg_headers(payload: Payload) -> tuple[tuple[str, str], ...]:
    """Headers of every leg: the client's end-to-end ones, the type of our body, and one request id for all legs."""
    return (*payload.headers, JSON_HEADER, ("X-Request-Id", payload.request_id))


def of_answer(state: State, engine: Engine, happening: Happening, siblings: Sequence[Leg] = ()) -> list[Command]:
    """What the answering call's end or first data means; `siblings` are the other open legs, hung up with it."""
    match happening:
        case Answered(status=200) if _is_json(happening.body):
            return [Answer(200, happening.body, happening.content_type)]
        case HeadEvent():
            return _head_event(state, engine, happening, siblings)
        case Answered() | Broken():
            return ended(state, happening, engine, siblings=siblings)


def _head_event(state: State, engine: Engine, happening: HeadEvent, siblings: Sequence[Leg]) -> list[Command]:
    """The stream's first data decides: output commits, an error under HTTP 200 is treated like its status.

    Nothing is decided by the chunk that only names the role: vLLM sends it before it looks whether the request failed.
    Source: vllm 0.32.0, a chat stream recorded with a failed KV load.
    """
    try:
        event = _EVENT.decode(happening.data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ended(state, happening, engine, siblings=siblings)
    if event.error is None:
        return [] if event.choices and all(map(_is_preamble, event.choices)) else [Commit()]
    status = event.error.get("code") if isinstance(event.error, dict) else None
    return ended(state, happening, engine, status=status if type(status) is int else 500, siblings=siblings)


def _is_preamble(choice: _Choice) -> bool:
    delta = choice.delta or {}
    return "role" in delta and choice.finish_reason is None and not any(v for k, v in delta.items() if k != "role")


def _is_json(body: bytes) -> bool:
    try:
        msgspec.json.decode(body, type=msgspec.Raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True
