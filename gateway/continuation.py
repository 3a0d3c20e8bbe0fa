"""Keeps what a stream has said, within bounds, so that another engine can say the rest when its own dies.

The bytes of its events are kept as they came and looked into only when the stream breaks. What one stream and all of
them may keep is bounded: a stream that is over either bound can no longer be continued, and says so when it breaks.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from adapters.base import Payload
from adapters.continuation import (
    TOKEN_IDS,
    Rewriting,
    Said,
    TextOf,
    closing_events,
    hide_token_ids,
    rest_of,
    said_in,
    without_half_characters,
)
from adapters.sse import EventCounter
from gateway.engine_call import EngineCall


@dataclass(frozen=True, slots=True)
class ContinuationLimits:
    """Whether broken streams are continued, and what may be kept for it."""

    is_on: bool = True
    asks_for_ids: bool = True
    max_stream_bytes: int = 2**20
    max_bytes: int = 256 * 2**20


class ContinuationMemory:
    """The bytes that all streams together keep."""

    def __init__(self, max_bytes: int) -> None:
        self._left = self._max = max_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes kept now."""
        return self._max - self._left

    def take(self, size: int) -> bool:
        """Whether so many more may be kept; they count from now on."""
        if size > self._left:
            return False
        self._left -= size
        return True

    def give_back(self, size: int) -> None:
        """Counts them no more."""
        self._left += size


Resume = Callable[[Payload, Said, str], Awaitable[EngineCall | None]]
"""Asks for the rest; `str` is why. None: nobody can say it."""


class Continuation:
    """What one stream has said, and how it goes on. `close` it when the stream is over."""

    def __init__(
        self,
        payload: Payload,
        memory: ContinuationMemory,
        max_bytes: int,
        resume: Resume,
        *,
        text_of: TextOf,
        shows_ids: bool,
    ) -> None:
        """`payload` is the client's request. `text_of` tells the text of token ids, `shows_ids` whether the client
        asked for the ids that engines tell."""
        self._payload = payload
        self._memory = memory
        self._max_bytes = max_bytes
        self._resume = resume
        self._text_of = text_of
        self._shows_ids = shows_ids
        self._raw: list[bytes] = []
        self._size = 0
        self._is_full = False
        self._said = Said()
        """By the streams before this one."""
        self._rewriting: Rewriting | None = None
        self.prompt_tokens: int | None = None
        """Of the client's prompt, where an engine counted them."""

    def take(self, events: bytes) -> bytes:
        """Keeps whole events of the engine; returns what the client is to see of them."""
        if not self._is_full:
            size = len(events)
            if self._size + size <= self._max_bytes and self._memory.take(size):
                self._size += size
                self._raw.append(events)
            else:
                self.close()
        if self._rewriting is not None:
            return self._rewritten(events, self._rewriting)
        return events if self._shows_ids else hide_token_ids(events)

    async def resume(self, failure: str) -> EngineCall | bytes | None:
        """The call that says the rest, or the bytes that are the rest; None where the stream cannot go on."""
        if self._is_full:
            return None
        said = await without_half_characters(said_in(b"".join(self._raw)), self._text_of)
        said = _joined(self._said, said)
        prompt_tokens = self.prompt_tokens if said.prompt_ids is None else len(said.prompt_ids)
        if said.finish_reason is not None:
            return closing_events(said, self._payload, prompt_tokens)
        rest = rest_of(self._payload, said)
        call = None if rest is None else await self._resume(rest, said, failure)
        if call is not None:
            self._forget()
            self._said = said
            self._rewriting = Rewriting(said, prompt_tokens, self._shows_ids)
        return call

    def close(self) -> None:
        """Gives the memory back."""
        self._forget()
        self._is_full = True

    def _forget(self) -> None:
        self._memory.give_back(self._size)
        self._raw.clear()
        self._size = 0

    def _rewritten(self, events: bytes, rewriting: Rewriting) -> bytes:
        out = []
        for block in events.replace(b"\r\n", b"\n").split(b"\n\n"):
            if not block.startswith(b"data:") or b"\n" in block:
                out.append(block)
            elif (data := rewriting.event(block[5:].strip())) is not None:
                out.append(b"data: " + data)
        return b"".join(block + b"\n\n" for block in out if block)


def _joined(before: Said, after: Said) -> Said:
    """What two streams said one after the other: the names and the prompt are those of the first."""
    if before.id is None:
        return after
    has_ids = before.token_ids is not None and after.token_ids is not None
    return replace(
        before,
        text=before.text + after.text,
        token_ids=(*(before.token_ids or ()), *(after.token_ids or ())) if has_ids else None,
        events=before.tokens + after.tokens,
        finish_reason=after.finish_reason,
        is_only_text=before.is_only_text and after.is_only_text,
    )


def before_error(events: bytes) -> bytes:
    """The whole events in front of the first that is an error."""
    good = []
    for block in events.split(b"\n\n"):
        counter = EventCounter()
        counter.feed(block + b"\n\n")
        if counter.is_error:
            break
        good.append(block + b"\n\n" if block else b"")
    return b"".join(good)


def client_asked_for_ids(payload: Payload) -> bool:
    """Whether the client itself wants to see token ids."""
    return bool(payload.body.get(TOKEN_IDS))
