"""One HTTP call to an engine: sends it, reports the first thing that matters, then hands the rest to whoever relays.

Before the commit it is cautious: bytes are held back, and each data event of a 200 stream is reported until the
Exchange commits; any other answer is reported when it is whole. A 200 head proves nothing: both engines can fail
afterwards, as an error event. After the commit it is a pipe.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from adapters.base import Answered, Broken, Call, Cause, Happening, HeadEvent
from adapters.sse import MAX_EVENT_BYTES, first_event
from gateway.core.errors import MalformedEngineData
from gateway.upstream import ConnectionPool, EngineConnection

EVENT_STREAM = b"text/event-stream"
BLANK_LINES = (b"\n\n", b"\r\n\r\n", b"\r\r")
MAX_HEAD_START_BYTES = MAX_EVENT_BYTES + 2**20
"""Bytes of a stream held back before it is committed: one event of the largest size, and whatever is read with it."""


@dataclass(frozen=True, slots=True)
class CallLimits:
    """Bounds on one call to an engine."""

    connect_timeout_s: float
    first_event_timeout_s: float
    answer_timeout_s: float
    max_response_bytes: int


class BodySink(Protocol):
    """Takes the body of a committed answer."""

    def data(self, data: bytes) -> None:
        """A piece arrived."""

    def flush(self) -> None:
        """All pieces of one read were given."""

    def chunk(self, framed: bytes, start: int) -> None:
        """One read was one whole chunk, nothing given before it waits for a flush, and its data end with an event:
        `framed[start:-2]`. What comes before and after them is HTTP's canonical framing of a chunk."""

    def end(self) -> None:
        """The body is complete."""

    def broken(self, cause: Cause, detail: str) -> None:
        """The engine's connection ended too early."""


@dataclass(frozen=True, slots=True)
class StaleConnection:
    """A kept-alive connection turned out closed before the engine answered a byte: the call may be sent once more."""

    call: EngineCall


class EngineCall:
    """A ResponseSink for one `Call`. Reports events of a stream, then one ending, until it is closed or relayed."""

    def __init__(
        self,
        call: Call,
        pool: ConnectionPool,
        limits: CallLimits,
        report: Callable[[Happening | StaleConnection], None],
        *,
        is_whole: bool,
        on_hang_up: Callable[[Call], None] = lambda call: None,
    ) -> None:
        """`is_whole`: nothing of the answer comes before all of it is generated.

        `on_hang_up` hears of the call when its connection is closed before its end.
        """
        self.call = call
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self._pool = pool
        self._connect_timeout_s = limits.connect_timeout_s
        self._max_bytes = limits.max_response_bytes
        self._report = report
        self._on_hang_up = on_hang_up
        self._limit_s = limits.answer_timeout_s if is_whole else limits.first_event_timeout_s
        self._limit_cause = Cause.HEAD_TIMEOUT
        if call.first_event_within_s is not None and call.first_event_within_s < self._limit_s:
            self._limit_s, self._limit_cause = call.first_event_within_s, Cause.LEASE
        self._connection: EngineConnection | None = None
        self._held = bytearray()
        self._seen = 0
        """How much of `_held` has been reported."""
        self._relay: BodySink | None = None
        self._is_reported = self._is_closed = self._is_ended = False
        self._ending: tuple[Cause, str] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._head_timer: asyncio.TimerHandle | None = None

    # ---- used by dispatch -------------------------------------------------------------------------------------------

    async def send(self, request_head: bytes, *, is_fresh: bool = False) -> None:
        """Sends on an idle connection or (always when `is_fresh`) a new one; what comes back is reported."""
        connection = None if is_fresh else self._pool.idle()
        if connection is None:
            connection = await self._connect()
        if connection is None:
            return
        if self._is_closed:
            connection.abort()
            return
        self._connection = connection
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._limit_s, self._timed_out, self._limit_cause, self._limit_s)
        within_s = self.call.head_within_s
        if within_s is not None and within_s < self._limit_s:
            self._head_timer = loop.call_later(within_s, self._timed_out, Cause.LEASE, within_s)
        connection.send(request_head, self.call.body, self)

    def take_held(self) -> bytes:
        """The body bytes held back so far; they are the caller's now."""
        held, self._held = bytes(self._held), bytearray()
        return held

    def relay_to(self, sink: BodySink) -> None:
        """Commits: held-back bytes go to `sink` now, everything after goes there as it arrives."""
        self._stop_timer()
        self._relay = sink
        if self._connection is not None and not self._is_ended:
            self._connection.pipe(sink.data, sink.flush, sink.chunk)
        if held := self.take_held():
            sink.data(held)
            sink.flush()
        if self._ending is not None:
            sink.broken(*self._ending)
        elif self._is_ended:
            sink.end()

    def close(self) -> None:
        """Hangs up: the engine aborts the request and nothing more is reported. A complete answer stays as it is."""
        self._is_closed = True
        self._stop_timer()
        if self._connection is not None and not self._is_ended:
            self._connection.abort()
            self._on_hang_up(self.call)
        self._connection = None

    def pause(self) -> None:
        """Stops reading from the engine."""
        if self._connection is not None and not self._is_ended:
            self._connection.pause()

    def resume(self) -> None:
        """Reads on."""
        if self._connection is not None and not self._is_ended:
            self._connection.resume()

    # ---- sending ----------------------------------------------------------------------------------------------------

    async def _connect(self) -> EngineConnection | None:
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                return await self._pool.connect()
        except TimeoutError:
            self._tell(Broken(self.call.leg, Cause.CONNECT, f"no connection in {self._connect_timeout_s:g} s"))
        except OSError as error:
            self._tell(Broken(self.call.leg, Cause.CONNECT, error.strerror or type(error).__name__))
        return None

    def give_up(self, detail: str) -> None:
        """Ends the call as lost unless it is relayed or over: its engine is known to be down."""
        if self._relay is None and not self._is_closed:
            self._drop(Cause.LOST, detail)

    def expect(self, within_s: float) -> None:
        """From now on the first event has to come within this time, unless its own limit ends before."""
        if self._timer is None or self._is_reported or self._is_closed:
            return
        loop = asyncio.get_running_loop()
        if loop.time() + within_s < self._timer.when():
            self._timer.cancel()
            self._timer = loop.call_later(within_s, self._timed_out, Cause.LEASE, within_s)

    def _timed_out(self, cause: Cause, limit_s: float) -> None:
        self._drop(cause, f"no answer in {limit_s:g} s")

    def _drop(self, cause: Cause, detail: str) -> None:
        """Hangs up and says why; a relay that was about to begin hears it too."""
        if not self._is_ended:
            self._ending = cause, detail
        self._tell(Broken(self.call.leg, cause, detail))
        self.close()

    # ---- ResponseSink -----------------------------------------------------------------------------------------------

    def head(self, status: int, headers: dict[bytes, bytes]) -> None:
        self.status, self.headers = status, headers
        if self._head_timer is not None:
            self._head_timer.cancel()

    def body(self, data: bytes) -> None:
        if self._relay is not None:
            self._relay.data(data)
        elif not self._is_closed:
            self._held += data

    def flush(self) -> None:
        if self._relay is not None:
            self._relay.flush()
        elif len(self._held) > (limit_bytes := MAX_HEAD_START_BYTES if self.is_stream else self._max_bytes):
            self._drop(Cause.TOO_LARGE, f"answer over {limit_bytes} bytes")
        elif self.is_stream and not self._is_reported:
            self._report_events()

    def end(self) -> None:
        self._is_ended = True
        if self._relay is not None:
            self._relay.end()
        elif self.is_stream and not self._is_reported:
            self._tell(Broken(self.call.leg, Cause.LOST, "the stream ended before its first token"))
        elif not self._is_reported:
            self._tell(Answered(self.call.leg, self.status, bytes(self._held), self.content_type))

    def broken(self, cause: Cause, detail: str) -> None:
        is_stale = self._connection is not None and self._connection.is_reused and not self._connection.has_answered
        if self._relay is not None:
            self._is_ended = True
            self._relay.broken(cause, detail)
        elif is_stale and self.call.is_replayable and cause is Cause.LOST and not self._is_closed:
            self._stop_timer()
            self._report(StaleConnection(self))
        else:
            self._is_ended = True
            self._ending = cause, detail
            self._tell(Broken(self.call.leg, cause, detail))

    # ---- what was seen ----------------------------------------------------------------------------------------------

    @property
    def is_stream(self) -> bool:
        """Whether the engine answers with server-sent events that the client is to see."""
        is_sse = self.headers.get(b"content-type", b"").startswith(EVENT_STREAM)
        return self.call.is_answer and self.status == 200 and is_sse

    @property
    def content_type(self) -> str:
        return self.headers.get(b"content-type", b"application/octet-stream").decode("latin-1")

    def _report_events(self) -> None:
        """Reports the whole events that were held back since the last look."""
        try:
            while not self._is_closed:
                unseen = bytes(self._held[self._seen :])
                boundary = last_boundary(unseen)
                data, size = first_event(unseen) if boundary else (None, 0)
                if data is None:
                    self._seen += boundary  # comments and fields without data, not to be read again
                    return
                self._seen += size
                self._report(HeadEvent(self.call.leg, data))
        except MalformedEngineData as error:
            self._drop(Cause.GARBAGE, error.message)

    def _tell(self, happening: Happening) -> None:
        self._stop_timer()
        if not self._is_reported and not self._is_closed:
            self._is_reported = True
            self._report(happening)

    def _stop_timer(self) -> None:
        for timer in (self._timer, self._head_timer):
            if timer is not None:
                timer.cancel()
        self._timer = self._head_timer = None


def last_boundary(data: bytes) -> int:
    """Where the last whole event of `data` ends: the offset after its blank line, 0 when there is none."""
    if data.endswith(b"\n\n"):
        return len(data)
    starts = [(data.rfind(separator), len(separator)) for separator in BLANK_LINES]
    return max(start + size if start >= 0 else 0 for start, size in starts)
