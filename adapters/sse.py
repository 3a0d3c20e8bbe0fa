"""Server-sent events by their framing: how many came and what the last one said, without parsing JSON per token.

Engines write one event per write, and the relay passes chunks on as they came, so nearly every chunk is whole events of
one line each. `EventCounter.feed` recognises such a chunk with a few bytes-methods and keeps only a reference to it.
Everything else (an event cut in two, comments, other line ends, `[DONE]`, errors) takes the exact line by line path.
Both paths give the same counts however the bytes were split.

Source: WHATWG HTML section 9.2.6 (fields, line ends, dispatch at a blank line).
"""

from __future__ import annotations

from typing import Final

from gateway.core.errors import MalformedEngineData

MAX_EVENT_BYTES: Final = 4 << 20
"""Default bound of one event; even one with logprobs of many tokens is a hundredth of it."""

_DONE: Final = b"[DONE]"
_ERROR: Final = b'{"error"'
_SPECIAL: Final = (b"data: " + _DONE, b"data: " + _ERROR, b"data:" + _DONE, b"data:" + _ERROR)
_PLAIN: Final = b'data: {"id"'
_NEXT: Final = b"\n\ndata:"


class EventCounter:
    """Counts the data events of one stream as it passes by. Memory is bounded by one event and one chunk."""

    __slots__ = ("_last", "_lines", "_tail", "is_done", "is_error")

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._lines = _Lines(max_event_bytes)
        self._tail = b""
        self._last = b""
        self.is_done = False
        """Whether `[DONE]` came."""
        self.is_error = False
        """Whether an error event came."""

    def feed(self, chunk: bytes) -> int:
        """Data events completed by this chunk; comments, `[DONE]` and error events are not counted.

        Raises MalformedEngineData when one event is longer than the limit.
        """
        lines = self._lines
        if lines.is_between_events and len(chunk) <= lines.limit and (count := _plain_events(chunk)):
            lines.skips_lf = False
            self._tail = chunk
            return count
        return self._feed_lines(chunk)

    @property
    def last_data(self) -> bytes:
        """Data of the last counted event, where engines put the usage; empty before the first."""
        if self._tail:
            start = self._tail.rfind(_NEXT)
            self._last = _data(self._tail[start + 2 if start >= 0 else 0 : -2]) or b""
            self._tail = b""
        return self._last

    def _feed_lines(self, chunk: bytes) -> int:
        count = 0
        for is_error, data in self._lines.feed(chunk):
            if data == _DONE:
                self.is_done = True
            elif is_error or data.startswith(_ERROR):
                self.is_error = True
            else:
                count += 1
                self._tail, self._last = b"", data
        return count


def first_event(buffer: bytes, max_event_bytes: int = MAX_EVENT_BYTES) -> tuple[bytes | None, int]:
    """The first event's data and the number of bytes up to its end; (None, 0) while there is no whole data event.

    Raises MalformedEngineData when the event is longer than the limit.
    """
    lines = _Lines(max_event_bytes)
    consumed = 0
    for line in buffer.splitlines(keepends=True):
        consumed += len(line)
        for _, data in lines.feed(line):
            return data, consumed
    return None, 0


def _plain_events(chunk: bytes) -> int:
    """How many events the chunk is, when it is nothing but whole events of one data line each; else 0."""
    # `find` costs half of `in`, which tries first whether its left side is a number.
    if not (chunk.startswith(b"data:") and chunk.endswith(b"\n\n")) or chunk.find(b"\r") >= 0:
        return 0
    if chunk.find(b"\n") == len(chunk) - 2:
        # An event of a generation begins so; any other is held against the special ones.
        return 1 if chunk.startswith(_PLAIN) or not chunk.startswith(_SPECIAL) else 0
    count = chunk.count(_NEXT) + 1
    is_plain = chunk.count(b"\n") == 2 * count and _DONE not in chunk and _ERROR not in chunk
    return count if is_plain else 0


def _data(line: bytes) -> bytes | None:
    """The value of a `data` field, or None when the line is another field or a comment."""
    if line.startswith(b"data:"):
        return line[6:] if line.startswith(b"data: ") else line[5:]
    return b"" if line == b"data" else None


class _Lines:
    """The exact parser. A line ends at LF, CR or CRLF: a CR ends it at once and makes a LF right after it void."""

    __slots__ = ("_held", "_is_error", "_partial", "_values", "limit", "skips_lf")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.skips_lf = False
        self._partial: list[bytes] = []
        self._values: list[bytes] = []
        self._held = 0
        self._is_error = False

    @property
    def is_between_events(self) -> bool:
        """Whether the next byte starts a new event."""
        return not (self._held or self._is_error)

    def feed(self, chunk: bytes) -> list[tuple[bool, bytes]]:
        """The events that this chunk completes: (whether its name is `error`, its data lines joined)."""
        if self.skips_lf and chunk:
            chunk, self.skips_lf = chunk.removeprefix(b"\n"), False
        events = []
        for line in chunk.splitlines(keepends=True):
            self._hold(len(line.rstrip(b"\r\n")))
            self._partial.append(line)
            if line.endswith((b"\n", b"\r")) and (event := self._end_line()) is not None:
                events.append(event)
        self.skips_lf = self.skips_lf or chunk.endswith(b"\r")
        return events

    def _hold(self, size: int) -> None:
        self._held += size
        if self._held > self.limit:
            raise MalformedEngineData(f"An engine sent an event of more than {self.limit} bytes.")

    def _end_line(self) -> tuple[bool, bytes] | None:
        """Takes the whole line in; the event it completes, if it is a blank line after data."""
        line = b"".join(self._partial).rstrip(b"\r\n")
        self._partial.clear()
        if not line:
            return self._end_event()
        if (value := _data(line)) is not None:
            self._values.append(value)
        else:
            self._held -= len(line)
        if line.startswith(b"event:"):
            self._is_error = line[6:].strip() == b"error"
        return None

    def _end_event(self) -> tuple[bool, bytes] | None:
        event = (self._is_error, b"\n".join(self._values)) if self._values else None
        self._values.clear()
        self._held, self._is_error = 0, False
        return event
