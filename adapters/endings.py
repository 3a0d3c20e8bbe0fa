"""Every way an exchange can end, in one table: state x event -> what is done, who frees what, what the client sees.

An Exchange looks its failures up here (`ended`), so that no connector has an ending of its own; the shell's endings, of
clients that leave and gateways that stop, stand in the same table and are tested against it. The README's table is made
of it (`python -m gateway.endings_reference`). No path waits for an engine's own 300 or 480 s: each limit is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from adapters.answers import client_error_body
from adapters.base import Answer, Answered, Broken, Cause, Command, Hangup, Happening, HeadEvent, Leg, Retry
from gateway.core.types import Engine


class State(StrEnum):
    """How far an exchange is. The string is what the README says."""

    ALONE = "one leg, before its first token"
    PREFILL = "prefill leg open, decode not called"
    BOTH = "both legs open"
    DECODE = "prefill over, decode before its first token"
    RELAY = "first token sent"


class Event(StrEnum):
    """What happened to it."""

    CONNECT = "connection refused"
    HEAD_TIMEOUT = "no head or first event in time"
    LEASE = "lease about to end"
    REQUEST_FAULT = "4xx that any engine would give"
    STATUS = "any other status (401, 429, 5xx)"
    ERROR_EVENT = "SSE error event under 200"
    GARBAGE = "bytes that are not the protocol"
    LOST = "connection lost"
    SILENCE = "data stopped"
    SIBLING = "the other leg failed"
    CLIENT_GONE = "client gone"
    DRAINING = "gateway's stop grace over"


class Outcome(StrEnum):
    """What becomes of the request."""

    RETRY = "decided again without this engine"
    RETRY_DOWN = "engine marked down; decided again without it"
    ANSWER = "the engine's answer goes to the client"
    CONTINUE = "continued on another pair; where that cannot be, one error event"
    FOLLOW = "this leg is hung up too"
    STOP = "all legs hung up"


class Release(StrEnum):
    """Who frees the prefill engine's blocks."""

    NONE = "nothing is held"
    ABORT = "the engine, when its connection closes"
    NOTICE = "the prefill engine, told by the decode engine"
    LEASE = "the prefill engine, when its own lease ends: stranded until then"


@dataclass(frozen=True, slots=True)
class Ending:
    """One cell of the table."""

    outcome: Outcome
    release: Release


def _endings(releases: Mapping[Event, Release], other: Release, **changes: Outcome) -> Mapping[Event, Ending]:
    """The endings before the first token: all events but SIBLING and SILENCE retry, unless changed."""
    usual: dict[Event, Outcome] = {
        event: Outcome.RETRY for event in Event if event not in (Event.SIBLING, Event.SILENCE, Event.LEASE)
    }
    usual |= {
        Event.CONNECT: Outcome.RETRY_DOWN,
        Event.REQUEST_FAULT: Outcome.ANSWER,
        Event.CLIENT_GONE: Outcome.STOP,
        Event.DRAINING: Outcome.STOP,
    }
    usual |= {Event[name]: outcome for name, outcome in changes.items()}
    return MappingProxyType(
        {event: Ending(usual[event], releases.get(event, other)) for event in Event if event in usual}
    )


ENDINGS: Final[Mapping[State, Mapping[Event, Ending]]] = MappingProxyType(
    {
        State.ALONE: _endings({Event.CONNECT: Release.NONE}, Release.ABORT, SILENCE=Outcome.RETRY),
        # A prefill that ended in the very moment its connection broke holds its blocks for a reader it will never have.
        State.PREFILL: _endings(
            {Event.CONNECT: Release.NONE, Event.LOST: Release.LEASE}, Release.ABORT, SILENCE=Outcome.RETRY
        ),
        State.BOTH: _endings({}, Release.ABORT, SILENCE=Outcome.RETRY, SIBLING=Outcome.FOLLOW),
        # A decode engine tells the prefill engine only of what it refuses itself and of clients that leave: of requests
        # that it never had, or had when it died, the prefill engine hears nothing.
        State.DECODE: _endings(
            {
                Event.REQUEST_FAULT: Release.NOTICE,
                Event.CLIENT_GONE: Release.NOTICE,
                Event.DRAINING: Release.NOTICE,
            },
            Release.LEASE,
            SILENCE=Outcome.RETRY,
            LEASE=Outcome.RETRY,
        ),
        State.RELAY: MappingProxyType(
            {
                event: Ending(
                    Outcome.STOP if event in (Event.CLIENT_GONE, Event.DRAINING) else Outcome.CONTINUE, Release.ABORT
                )
                for event in (
                    *(Event.ERROR_EVENT, Event.GARBAGE, Event.LOST),
                    *(Event.SILENCE, Event.CLIENT_GONE, Event.DRAINING),
                )
            }
        ),
    }
)
"""What cannot happen has no cell: a connection that is refused after the first token, a sibling of a single leg."""

# Any engine would say the same of this request, so another attempt is of no use. Other 4xx (wrong key, time-out, too
# many requests) speak of the engine or of the moment. Source: vllm/entrypoints/serve/exception_handling (0.32.0).
REQUEST_AT_FAULT: Final = frozenset({400, 404, 405, 413, 415, 422, 501})

_OF_CAUSE: Final = {
    Cause.CONNECT: Event.CONNECT,
    Cause.HEAD_TIMEOUT: Event.HEAD_TIMEOUT,
    Cause.LEASE: Event.LEASE,
    Cause.IDLE_TIMEOUT: Event.SILENCE,
    Cause.LOST: Event.LOST,
    Cause.GARBAGE: Event.GARBAGE,
    Cause.TOO_LARGE: Event.GARBAGE,
}


def event_of(happening: Happening, status: int | None = None) -> Event:
    """Which event a failed happening is; `status`: of an error that came as an event under HTTP 200."""
    match happening:
        case Broken():
            return _OF_CAUSE[happening.cause]
        case Answered():
            if happening.status == 200:
                return Event.GARBAGE
            return Event.REQUEST_FAULT if happening.status in REQUEST_AT_FAULT else Event.STATUS
        case HeadEvent():
            if status is None:
                return Event.GARBAGE
            return Event.REQUEST_FAULT if status in REQUEST_AT_FAULT else Event.ERROR_EVENT


def ended(
    state: State,
    happening: Happening,
    engine: Engine,
    *,
    status: int | None = None,
    siblings: Sequence[Leg] = (),
) -> list[Command]:
    """The commands that end an attempt in `state` because of a failure at `engine`.

    `siblings`: the other legs that are open. `status`: of an error event under HTTP 200. A happening that cannot be in
    that state (a lease before there is one) ends like a time-out.
    """
    event = event_of(happening, status)
    cells = ENDINGS[state]
    ending = cells.get(event) or cells[Event.HEAD_TIMEOUT]
    legs = [*([happening.leg] if isinstance(happening, HeadEvent) else []), *siblings]
    commands: list[Command] = [Hangup(leg) for leg in legs]
    if ending.outcome is Outcome.ANSWER:
        told = happening.status if isinstance(happening, Answered) else status
        body = happening.body if isinstance(happening, Answered) else _data(happening)
        assert told is not None, "only an answer or an error event says that the request is at fault"
        return [*commands, Answer(told, client_error_body(told, body))]
    is_down, strands = ending.outcome is Outcome.RETRY_DOWN, ending.release is Release.LEASE
    return [*commands, Retry(engine.id, reason(happening, status), is_down, strands)]


def reason(happening: Happening, status: int | None = None) -> str:
    """The failure in one word, for the log and the journal: `decode_lost`, `prefill_status_503`."""
    match happening:
        case Broken():
            return f"{happening.leg}_{happening.cause}"
        case Answered() if happening.status != 200:
            return f"{happening.leg}_status_{happening.status}"
        case HeadEvent() if status is not None:
            return f"{happening.leg}_status_{status}"
    return f"{happening.leg}_{Cause.GARBAGE}"


def _data(happening: Happening) -> bytes:
    return happening.data if isinstance(happening, HeadEvent) else b""
