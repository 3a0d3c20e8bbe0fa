"""The data plane: a committed engine stream to one client, bytes as they are.

A chunk passes through one `data_received` and one `transport.write`. Events are counted by their framing; nobody parses
JSON per token. Only whole events go out, so that a stream cut in the middle of one can still be ended with one clean
error event: a client never sees half an event, nor a truncation that looks complete.

Back-pressure: when the client's socket buffer is over its high-water mark the engine connection stops being read, so a
slow reader costs one socket buffer here and one there, and the engine stops too. The coroutine below only sleeps until
the stream ends or has to wait for the client.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import cast

from aiohttp import web

from adapters.answers import Usage, refusal, usage
from adapters.base import Cause
from adapters.sse import MAX_EVENT_BYTES, EventCounter
from gateway.continuation import Continuation, before_error
from gateway.core.errors import EngineUnavailable, MalformedEngineData
from gateway.core.gaps import GapHistogram
from gateway.dispatch import StreamEnd
from gateway.engine_call import EngineCall, last_boundary

PROGRESS_EVENTS = 32
"""Events between two words to the scheduler: it wants to know how far a decode is, not each step of it."""


class Turn(Enum):
    """Why the relay's coroutine was woken."""

    ENDED = auto()
    CLIENT_IS_SLOW = auto()
    ENGINE_IS_SILENT = auto()


@dataclass(slots=True)
class RelayTotals:
    """What all streams together did since the start."""

    open_count: int = 0
    """Streams under way now."""
    sent_bytes: int = 0
    stall_count: int = 0
    """Pauses of an engine connection because a client did not read."""


class StreamRelay:
    """Copies one committed stream to one client. Use: `await StreamRelay(...).run()`."""

    def __init__(
        self,
        request: web.BaseRequest,
        call: EngineCall,
        *,
        idle_timeout_s: float,
        write_timeout_s: float,
        expects_done: bool,
        on_progress: Callable[[int], None],
        continuation: Continuation | None = None,
        totals: RelayTotals | None = None,
    ) -> None:
        """`continuation`: what lets another engine go on when this one dies; None: the stream ends with it."""
        self._totals = totals or RelayTotals()
        self._sent_bytes = 0
        self._request = request
        self._call = call
        self._idle_timeout_s = idle_timeout_s
        self._write_timeout_s = write_timeout_s
        self._expects_done = expects_done
        self._on_progress = on_progress
        self._continuation = continuation
        self._transport = cast(asyncio.Transport, request.transport)
        self._protocol = request.protocol
        self._is_chunked = False
        self._counter = EventCounter()
        self._gaps = GapHistogram()
        self._loop = asyncio.get_running_loop()
        self._time = self._loop.time
        self._pieces: list[bytes] = []
        self._tail = b""
        """The beginning of an event whose end has not come yet."""
        self._heard_at = self._event_at = self._loop.time()
        self._events = 0
        self._reported_events = 0
        self._failure: str | None = None
        self._is_ended = False
        self._turn: asyncio.Future[Turn] = self._loop.create_future()
        self._idle_timer = self._loop.call_later(idle_timeout_s, self._check_idle)

    async def run(self, response: web.StreamResponse) -> StreamEnd:
        """Relays until the stream is over. Raises ConnectionError or CancelledError when the client is gone."""
        self._totals.open_count += 1
        try:
            await response.prepare(self._request)
            self._is_chunked = response.headers.get("transfer-encoding") == "chunked"  # not for HTTP/1.0
            self._request.writer.send_headers()
            self._call.relay_to(self)
            while True:
                while not self._is_ended or self._turn.done():
                    await self._next_turn()
                if self._failure is None or not await self._go_on(response):
                    break
        finally:
            self._idle_timer.cancel()
            self._totals.open_count -= 1
            self._totals.sent_bytes += self._sent_bytes
        if self._failure is not None:
            await response.write(b"data: " + refusal(EngineUnavailable(self._failure)) + b"\n\n")
        return self._end()

    async def _go_on(self, response: web.StreamResponse) -> bool:
        """Whether the stream goes on at another engine. One that had only to be closed is closed here."""
        if self._continuation is None or self._failure is None:
            return False
        self._idle_timer.cancel()
        rest = await self._continuation.resume(self._failure)
        if isinstance(rest, bytes):
            self._failure = None
            await response.write(rest)
        if not isinstance(rest, EngineCall):
            return False
        self._call, self._counter, self._tail = rest, EventCounter(), b""
        self._failure, self._is_ended = None, False
        self._turn = self._loop.create_future()
        self._heard_at = self._loop.time()
        self._idle_timer = self._loop.call_later(self._idle_timeout_s, self._check_idle)
        rest.relay_to(self)
        return True

    async def _next_turn(self) -> None:
        turn = await self._turn
        self._turn = self._loop.create_future()
        if turn is Turn.CLIENT_IS_SLOW:
            await self._drain()
            self._heard_at = self._event_at = self._loop.time()  # the pause was the client's, not the engine's
            self._call.resume()
        elif turn is Turn.ENGINE_IS_SILENT:
            self._call.close()
            self._fail(f"the engine sent nothing for {self._idle_timeout_s:g} s")

    async def _drain(self) -> None:
        """Returns when the client reads on. Raises ConnectionError when it does not in time."""
        try:
            async with asyncio.timeout(self._write_timeout_s):
                await self._request.writer.drain()
        except TimeoutError:
            self._transport.abort()
            raise ConnectionError(f"the client read nothing for {self._write_timeout_s:g} s") from None

    # ---- BodySink: called from the engine connection ----------------------------------------------------------------

    def data(self, data: bytes) -> None:
        self._pieces.append(data)

    def flush(self) -> None:
        pieces = self._pieces
        if not pieces:
            return
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        whole = self._take_whole(data)
        if whole and not self._transport.is_closing():
            self._write(b"%x\r\n%b\r\n" % (len(whole), whole) if self._is_chunked else whole, len(whole))

    def chunk(self, framed: bytes, start: int) -> None:
        if self._tail:
            self.data(framed[start:-2])
            self.flush()
            return
        data = framed[start:-2]
        self._heard_at = self._time()
        shown = self._noted(data)
        if not shown or self._transport.is_closing():
            return
        if not self._is_chunked:
            self._write(shown, len(shown))
        elif shown is data:  # nothing of it changed: its framing is what ours would be
            self._write(framed, len(shown))
        else:
            self._write(b"%x\r\n%b\r\n" % (len(shown), shown), len(shown))

    def _write(self, framed: bytes, size: int) -> None:
        """Writes `size` bytes of events in their framing; where the client does not read, the engine has to wait."""
        self._sent_bytes += size
        self._transport.write(framed)
        if self._protocol.writing_paused:
            self._call.pause()
            self._totals.stall_count += 1
            self._wake(Turn.CLIENT_IS_SLOW)

    def end(self) -> None:
        is_complete = self._counter.is_done or self._counter.is_error or not self._expects_done
        if is_complete and not self._tail:
            self._wake(Turn.ENDED)
        else:
            self._fail("the engine's stream ended early")

    def broken(self, cause: Cause, detail: str) -> None:
        self._fail(f"the engine's stream broke: {detail}")

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _take_whole(self, data: bytes) -> bytes:
        """What the client is to see of the whole events in `data` and what was left before it; the rest is kept."""
        self._heard_at = self._loop.time()
        if self._tail or not data.endswith(b"\n\n"):
            data = self._tail + data
            cut = last_boundary(data)
            data, self._tail = data[:cut], data[cut:]
            if len(self._tail) > MAX_EVENT_BYTES:
                self._call.close()
                self._fail(f"the engine sent an event of more than {MAX_EVENT_BYTES} bytes")
                return b""
        return self._noted(data) if data else data

    def _noted(self, data: bytes) -> bytes:
        """What the client is to see of whole events, which are counted and timed."""
        try:
            if self._continuation is not None:
                data = self._continuation.take(data)
            events = self._counter.feed(data) if data else 0
        except MalformedEngineData as error:
            self._call.close()
            self._fail(error.message)
            return b""
        if events:
            heard_at = self._heard_at
            if self._events:
                self._gaps.add(heard_at - self._event_at, events)
            self._event_at = heard_at
            self._events += events
            if self._events - self._reported_events >= PROGRESS_EVENTS:
                self._reported_events = self._events
                self._on_progress(self._events)
        if self._counter.is_error and self._continuation is not None:
            self._call.close()
            self._failure = "the engine reported an error"  # its [DONE] may be here already, and is no end
            self._wake(Turn.ENDED)
            return before_error(data)
        return data

    def _check_idle(self) -> None:
        """Runs about once per limit, not per chunk: looks how long ago the last bytes came."""
        silent_s = self._loop.time() - self._heard_at
        is_paused = self._request.protocol.writing_paused
        if silent_s >= self._idle_timeout_s and not is_paused:
            self._wake(Turn.ENGINE_IS_SILENT)
            return
        left_s = self._idle_timeout_s if is_paused else self._idle_timeout_s - silent_s
        self._idle_timer = self._loop.call_later(left_s, self._check_idle)

    def _fail(self, failure: str) -> None:
        """Ends the stream; after its `[DONE]` nothing was missing, however the engine's connection ended."""
        if not self._counter.is_done or self._tail:
            self._failure = failure
        self._wake(Turn.ENDED)

    def _wake(self, turn: Turn) -> None:
        """Wakes the coroutine. An end that comes while it waits for a slow client is seen when it is done with that."""
        if turn is Turn.ENDED:
            self._is_ended = True
        if not self._turn.done():
            self._turn.set_result(turn)

    def _end(self) -> StreamEnd:
        told = usage(self._counter.last_data) or Usage()
        return StreamEnd(
            output_tokens=self._events if told.output_tokens is None else told.output_tokens,
            prompt_tokens=told.prompt_tokens,
            cached_tokens=told.cached_tokens,
            tbt_s=self._gaps.slow_mean_s,
            failure=self._failure or ("the engine reported an error" if self._counter.is_error else None),
        )
