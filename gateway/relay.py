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
from enum import Enum, auto
from typing import cast

from aiohttp import web

from adapters.base import Cause
from adapters.openai import error_body
from adapters.sse import EventCounter
from gateway.core.errors import MalformedEngineData
from gateway.core.gaps import GapHistogram
from gateway.dispatch import StreamEnd
from gateway.engine_call import EngineCall

PROGRESS_EVENTS = 32
"""Events between two words to the scheduler: it wants to know how far a decode is, not each step of it."""


class Turn(Enum):
    """Why the relay's coroutine was woken."""

    ENDED = auto()
    CLIENT_IS_SLOW = auto()
    ENGINE_IS_SILENT = auto()


class StreamRelay:
    """Copies one committed stream to one client. Use: `await StreamRelay(...).run()`."""

    def __init__(
        self,
        request: web.BaseRequest,
        call: EngineCall,
        *,
        idle_timeout_s: float,
        expects_done: bool,
        on_progress: Callable[[int], None],
    ) -> None:
        self._request = request
        self._call = call
        self._idle_timeout_s = idle_timeout_s
        self._expects_done = expects_done
        self._on_progress = on_progress
        self._transport = cast(asyncio.Transport, request.transport)
        self._is_chunked = False
        self._counter = EventCounter()
        self._gaps = GapHistogram()
        self._loop = asyncio.get_running_loop()
        self._pieces: list[bytes] = []
        self._tail = b""
        """The beginning of an event whose end has not come yet."""
        self._last_at = self._loop.time()
        self._reported_events = 0
        self._failure: str | None = None
        self._is_over = False
        self._turn: asyncio.Future[Turn] = self._loop.create_future()
        self._idle_timer = self._loop.call_later(idle_timeout_s, self._check_idle)

    async def run(self, response: web.StreamResponse) -> StreamEnd:
        """Relays until the stream is over. Raises ConnectionError or CancelledError when the client is gone."""
        try:
            await response.prepare(self._request)
            self._is_chunked = bool(response.chunked)
            await self._send_first(response)
            self._call.relay_to(self)
            while not self._is_over:
                await self._next_turn()
        finally:
            self._idle_timer.cancel()
        if self._failure is not None:
            await response.write(b"data: " + error_body(self._failure, kind="engine_error", code=502) + b"\n\n")
        return self._end()

    async def _send_first(self, response: web.StreamResponse) -> None:
        """The held-back bytes in one write with the headers."""
        whole = self._take_whole(self._call.take_held())
        await response.write(whole)

    async def _next_turn(self) -> None:
        turn = await self._turn
        self._turn = self._loop.create_future()
        match turn:
            case Turn.CLIENT_IS_SLOW:
                await self._request.writer.drain()
                self._last_at = self._loop.time()
                self._call.resume()
            case Turn.ENGINE_IS_SILENT:
                self._call.close()
                self._is_over = True
                self._failure = f"the engine sent nothing for {self._idle_timeout_s:g} s"
            case Turn.ENDED:
                self._is_over = True

    # ---- BodySink: called from the engine connection ----------------------------------------------------------------

    def data(self, data: bytes) -> None:
        self._pieces.append(data)

    def flush(self) -> None:
        if not self._pieces:
            return
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        whole = self._take_whole(data)
        if not whole or self._transport.is_closing():
            return
        self._transport.write(b"%x\r\n%b\r\n" % (len(whole), whole) if self._is_chunked else whole)
        if self._request.protocol.writing_paused:
            self._call.pause()
            self._wake(Turn.CLIENT_IS_SLOW)

    def end(self) -> None:
        is_cut = bool(self._tail) or (self._expects_done and not self._counter.is_done)
        if is_cut:
            self._failure = "the engine's stream ended early"
        self._finish()

    def broken(self, cause: Cause, detail: str) -> None:
        self._failure = f"the engine's stream broke: {detail}"
        self._finish()

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _take_whole(self, data: bytes) -> bytes:
        """The whole events in `data` and what was left before it; the rest is kept. Counts and times the events."""
        if self._tail:
            data = self._tail + data
            self._tail = b""
        if not data.endswith(b"\n\n"):
            cut = self._counter.boundary(data)
            data, self._tail = data[:cut], data[cut:]
        if not data:
            return data
        try:
            events = self._counter.feed(data)
        except MalformedEngineData as error:
            self._failure = error.message
            self._call.close()
            self._finish()
            return b""
        now = self._loop.time()
        if events and self._counter.events > events:
            self._gaps.add(now - self._last_at, events)
        self._last_at = now
        if self._counter.events - self._reported_events >= PROGRESS_EVENTS:
            self._reported_events = self._counter.events
            self._on_progress(self._counter.events)
        return data

    def _check_idle(self) -> None:
        """Runs about once per limit, not per chunk: looks how long ago the last bytes came."""
        silent_s = self._loop.time() - self._last_at
        is_paused = self._request.protocol.writing_paused
        if silent_s >= self._idle_timeout_s and not is_paused:
            self._wake(Turn.ENGINE_IS_SILENT)
            return
        left_s = self._idle_timeout_s if is_paused else self._idle_timeout_s - silent_s
        self._idle_timer = self._loop.call_later(left_s, self._check_idle)

    def _finish(self) -> None:
        if not self._turn.done():
            self._turn.set_result(Turn.ENDED)
        self._is_over = True

    def _wake(self, turn: Turn) -> None:
        if not self._turn.done():
            self._turn.set_result(turn)

    def _end(self) -> StreamEnd:
        usage = self._counter.usage()
        counted = self._counter.events - 1 if self._counter.is_done else self._counter.events
        return StreamEnd(
            output_tokens=usage.output_tokens if usage and usage.output_tokens is not None else counted,
            prompt_tokens=usage.prompt_tokens if usage else None,
            cached_tokens=usage.cached_tokens if usage else None,
            tbt_s=self._gaps.slow_mean_s,
            failure=self._failure,
        )
