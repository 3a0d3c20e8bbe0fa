"""aiohttp's low-level HTTP server, with our bounds and our error shape.

The parser, limits and keep-alive are aiohttp's. Added are: what the parser itself refuses (broken request lines, header
bombs, bad framing) is answered in OpenAI's error shape; connections are counted; a head that does not come to its end
is answered 408 in time; and a client that does not read its answer is dropped, and with it what is held for it.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import structlog
from aiohttp import web

from adapters.answers import error_body, refusal
from gateway.core.errors import RequestTimeout

log = structlog.get_logger("sluice.server")

SERVER_NAME = "sluice"
"""The `server` header of every answer, in place of aiohttp's, which tells versions."""
HEADERS = {"server": SERVER_NAME}
LINGER_S = 1.0
"""How long a refused body is still read and thrown away, so that the client sees the answer and not a reset."""

HEAD_TIMED_OUT = (
    b"HTTP/1.1 408 Request Timeout\r\nserver: sluice\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\nconnection: close\r\n\r\n%b"
)
UNSENT_BYTES = 16_384
"""Most bytes of an answer that wait in the kernel beyond what the client's window takes: without it a client that reads
nothing costs megabytes there (`tcp_wmem`), with it the rest waits at the engine."""

Application = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class Connection(web.RequestHandler):
    """One client connection."""

    __slots__ = ("_head_timer", "_server", "_unread_timer")

    def __init__(self, server: Server, **settings: Any) -> None:
        super().__init__(server, **settings)
        self._server = server
        self._head_timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Takes the connection, or closes it at once when there are too many."""
        super().connection_made(transport)
        _bound_unsent(transport)
        self._server.open_count += 1
        if self._server.open_count > self._server.max_connections:
            log.warning("too many client connections", limit=self._server.max_connections)
            self.force_close()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._server.open_count -= 1
        self._stop_head_timer()
        self._stop_unread_timer()
        super().connection_lost(exc)

    # ---- a head that does not end -----------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Hands the bytes to aiohttp; where they leave a head unfinished, its time begins to run."""
        super().data_received(data)
        if self._messages or self._current_request is not None:
            self._stop_head_timer()
        elif self._head_timer is None:
            self._head_timer = self._loop.call_later(self._server.header_timeout_s, self._head_timed_out)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_timed_out(self) -> None:
        """Answers and hangs up, however busily the head still grows."""
        self._head_timer = None
        if self.transport is None or self._messages or self._current_request is not None:
            return
        error = RequestTimeout(f"The head of the request took longer than {self._server.header_timeout_s:g} s.")
        body = refusal(error)
        self.transport.write(HEAD_TIMED_OUT % (len(body), body))
        self.transport.write_eof()
        self._close = True  # what still comes is thrown away: closing on it would reset the answer away
        self._loop.call_later(LINGER_S, self.force_close)

    # ---- an answer that is not read ---------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        """The client reads slower than its answer comes: it has its time to go on."""
        super().pause_writing()
        if self._unread_timer is None:
            self._await_reading()

    def resume_writing(self) -> None:
        """The client read on."""
        self._stop_unread_timer()
        super().resume_writing()

    def force_close(self) -> None:
        """Closes; what the client has still not read when its time is over is thrown away."""
        transport = self.transport
        super().force_close()
        if transport is not None and self._unread_timer is None and transport.get_write_buffer_size():
            self._loop.call_later(self._server.write_timeout_s, transport.abort)

    def _stop_unread_timer(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None

    def _await_reading(self) -> None:
        held_bytes = self.transport.get_write_buffer_size() if self.transport is not None else 0
        self._unread_timer = self._loop.call_later(self._server.write_timeout_s, self._look_again, held_bytes)

    def _look_again(self, held_bytes: int) -> None:
        """A client that has read anything since the last look has its time again: slow lines take long."""
        if self.transport is not None and self.transport.get_write_buffer_size() < held_bytes:
            self._await_reading()
        elif self.transport is not None:
            log.warning("a client did not read its answer", limit_s=self._server.write_timeout_s)
            self.transport.abort()

    # ---- errors -----------------------------------------------------------------------------------------------------

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to what aiohttp could not parse; the connection ends with it."""
        if request.writer.output_size > 0:
            raise ConnectionError("an answer is under way already")
        kind = "invalid_request_error" if status < 500 else "internal_error"
        text = (message or "The request is not valid HTTP.").splitlines()[0] if status < 500 else "The gateway failed."
        body = error_body(text, kind, code=status)
        response = web.Response(status=status, body=body, content_type="application/json", headers=HEADERS)
        response.force_close()
        return response


def _bound_unsent(transport: asyncio.BaseTransport) -> None:
    sock = transport.get_extra_info("socket")
    if sock is not None and hasattr(socket, "TCP_NOTSENT_LOWAT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)


class Server(web.Server):
    """Makes a Connection for each client. A client that leaves cancels its handler."""

    def __init__(
        self,
        application: Application,
        *,
        max_connections: int,
        max_header_bytes: int,
        keepalive_s: float,
        header_timeout_s: float = 10.0,
        write_timeout_s: float = 60.0,
    ) -> None:
        super().__init__(self._serve, handler_cancellation=True)
        self._application = application
        self._running: set[asyncio.Task[Any]] = set()
        self.max_connections = max_connections
        self.header_timeout_s = header_timeout_s
        self.write_timeout_s = write_timeout_s
        self.open_count = 0
        """Connections open now."""
        self._settings: dict[str, Any] = {
            "keepalive_timeout": keepalive_s,
            "max_line_size": max_header_bytes,
            "max_field_size": max_header_bytes,
            "lingering_time": LINGER_S,
            "access_log": None,
        }

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        try:
            return await self._application(request)
        finally:
            self._running.discard(task)

    async def shutdown(self, timeout: float | None = None) -> None:
        """Returns when no request runs: those that take longer than `timeout` seconds are cancelled. aiohttp's own way
        would wait twice as long and leave cancelled handlers behind."""
        began_at = self._loop.time()
        if self._running:
            await asyncio.wait(self._running, timeout=timeout)
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(self._running)
        self.pre_shutdown()  # again: a connection that came in meanwhile is idle, and would be waited for
        left_s = 0.0 if timeout is None else timeout - (self._loop.time() - began_at)
        await super().shutdown(max(LINGER_S, left_s))  # for answers that are written but not yet sent

    def __call__(self) -> web.RequestHandler:
        return Connection(self, loop=asyncio.get_running_loop(), **self._settings)
