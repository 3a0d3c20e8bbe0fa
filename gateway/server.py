"""aiohttp's low-level HTTP server, with our bounds and our error shape.

The parser, limits, time-outs and keep-alive are aiohttp's. Two things are added: what the parser itself refuses (broken
request lines, header bombs, bad framing) is answered in OpenAI's error shape, and connections are counted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import structlog
from aiohttp import web

from adapters.answers import error_body

log = structlog.get_logger("sluice.server")

SERVER_NAME = "sluice"
"""The `server` header of every answer, in place of aiohttp's, which tells versions."""
HEADERS = {"server": SERVER_NAME}
LINGER_S = 1.0
"""How long a refused body is still read and thrown away, so that the client sees the answer and not a reset."""

Application = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class Connection(web.RequestHandler):
    """One client connection."""

    __slots__ = ("_server",)

    def __init__(self, server: Server, **settings: Any) -> None:
        super().__init__(server, **settings)
        self._server = server

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Takes the connection, or closes it at once when there are too many."""
        super().connection_made(transport)
        self._server.open_count += 1
        if self._server.open_count > self._server.max_connections:
            log.warning("too many client connections", limit=self._server.max_connections)
            self.force_close()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._server.open_count -= 1
        super().connection_lost(exc)

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


class Server(web.Server):
    """Makes a Connection for each client. A client that leaves cancels its handler."""

    def __init__(
        self, application: Application, *, max_connections: int, max_header_bytes: int, keepalive_s: float
    ) -> None:
        super().__init__(self._serve, handler_cancellation=True)
        self._application = application
        self._running: set[asyncio.Task[Any]] = set()
        self.max_connections = max_connections
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
        left_s = 0.0 if timeout is None else timeout - (self._loop.time() - began_at)
        await super().shutdown(max(LINGER_S, left_s))  # for answers that are written but not yet sent

    def __call__(self) -> web.RequestHandler:
        return Connection(self, loop=asyncio.get_running_loop(), **self._settings)
