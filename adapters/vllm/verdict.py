"""What an engine's response to a leg means for the attempt: go on, answer the client, or decide again."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from msgspec import Struct

from adapters.answers import client_error_body
from adapters.base import (
    Answer,
    Answered,
    Broken,
    Cause,
    Command,
    Commit,
    Hangup,
    Happening,
    HeadEvent,
    Leg,
    Payload,
    Retry,
)
from gateway.core.types import Engine

# Any engine would say the same of this request, so another attempt is of no use. Other 4xx (wrong key, time-out, too
# many requests) speak of the engine or of the moment. Source: vllm/entrypoints/serve/exception_handling (0.32.0).
REQUEST_AT_FAULT: Final = frozenset({400, 404, 405, 413, 415, 422, 501})

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


def of_answer(engine: Engine, happening: Happening) -> list[Command]:
    """What the answering call's end or first data means."""
    match happening:
        case Answered():
            return answered(engine, happening)
        case HeadEvent():
            return head_event(engine, happening)
        case Broken():
            return broken(engine, happening)


def broken(engine: Engine, happening: Broken) -> list[Command]:
    """The call never gave an answer: decide again without this engine."""
    reason = f"{happening.leg}_{happening.cause}"
    return [Retry(engine.id, reason, is_engine_down=happening.cause is Cause.CONNECT)]


def garbage(engine: Engine, leg: Leg) -> list[Command]:
    """The engine sent what its protocol does not know: drop the call and decide again without this engine."""
    return [Hangup(leg), Retry(engine.id, f"{leg}_{Cause.GARBAGE}")]


def refused(engine: Engine, happening: Answered) -> list[Command]:
    """A status other than 200: the client's own fault is passed on, anything else is tried elsewhere."""
    if happening.status in REQUEST_AT_FAULT:
        return [Answer(happening.status, client_error_body(happening.status, happening.body))]
    return [Retry(engine.id, f"{happening.leg}_status_{happening.status}")]


def answered(engine: Engine, happening: Answered) -> list[Command]:
    """The answering call came back whole: JSON under 200 goes to the client as it is."""
    if happening.status != 200:
        return refused(engine, happening)
    if not _is_json(happening.body):
        return [Retry(engine.id, f"{happening.leg}_{Cause.GARBAGE}")]
    return [Answer(200, happening.body, happening.content_type)]


def head_event(engine: Engine, happening: HeadEvent) -> list[Command]:
    """The stream's first data decides: output commits, an error under HTTP 200 is treated like its status.

    Nothing is decided by the chunk that only names the role: vLLM sends it before it looks whether the request failed.
    Source: vllm 0.32.0, a chat stream recorded with a failed KV load.
    """
    try:
        event = _EVENT.decode(happening.data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return garbage(engine, happening.leg)
    if event.error is None:
        return [] if event.choices and all(map(_is_preamble, event.choices)) else [Commit()]
    status = event.error.get("code") if isinstance(event.error, dict) else None
    told = Answered(happening.leg, status if isinstance(status, int) else 500, happening.data)
    return [Hangup(happening.leg), *refused(engine, told)]


def _is_preamble(choice: _Choice) -> bool:
    delta = choice.delta or {}
    return "role" in delta and choice.finish_reason is None and not any(v for k, v in delta.items() if k != "role")


def _is_json(body: bytes) -> bool:
    try:
        msgspec.json.decode(body, type=msgspec.Raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True
