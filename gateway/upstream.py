"""Connections to engines: HTTP/1.1 over asyncio.Protocol and httptools, pooled per engine.

aiohttp's client serves all control traffic; this one exists because a token is one `data_received` here and nothing
else (design section 7). It speaks just what engines speak: one request at a time on a connection, bodies known in full
before they are sent, responses with a length, chunked, or ended by close. Idle connections are dropped before the
engine drops them (uvicorn: 5 s), because a POST that meets a closing connection cannot be told from one that was lost.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, cast
from urllib.parse import urlsplit

import httptools

from adapters.base import Cause

RECEIVE_BYTES = 65_536
"""Receive buffer of a connection (Linux doubles it): bounds what one read may bring for a client that takes no more. A
token is 250 bytes, and 128 KB under way are 128 MB/s at a millisecond's distance."""

MAX_HEAD_BYTES = 65_536
"""A response head beyond this is garbage. Precedent: aiohttp and h11 refuse far smaller ones."""

EVENT_CHUNK_END = b"\n\n\r\n"
"""How a chunk ends whose last bytes are the end of an event."""


class ResponseSink(Protocol):
    """Where a response goes, piece by piece, on the event loop. `end` or `broken` comes last, exactly once."""

    def head(self, status: int, headers: dict[bytes, bytes]) -> None:
        """Status and headers arrived; names in lower case."""

    def body(self, data: bytes) -> None:
        """A piece of the body arrived."""

    def flush(self) -> None:
        """All pieces of one read from the socket were given."""

    def end(self) -> None:
        """The response is complete."""

    def broken(self, cause: Cause, detail: str) -> None:
        """No more will come, and what came is not complete."""


class EngineConnection(asyncio.Protocol):
    """One connection. `send` starts a response into a sink; a complete one gives the connection back to its pool."""

    def __init__(
        self, on_idle: Callable[[EngineConnection], None], on_closed: Callable[[EngineConnection], None]
    ) -> None:
        self._on_idle = on_idle
        self._on_closed = on_closed
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._sink: ResponseSink | None = None
        self._take: Callable[[bytes], None] = _ignore
        self._flush: Callable[[], None] = _ignore
        self._piped_chunk: Callable[[bytes, int], None] | None = None
        self._take_chunk: Callable[[bytes, int], None] | None = None
        """`_piped_chunk` while the parser stands between two chunks, so that a whole one may pass it by."""
        self._is_between_chunks = False
        self._headers: dict[bytes, bytes] = {}
        self._head_bytes = 0
        self._is_head_done = False
        self._is_until_close = False
        self._is_paused = False
        self.idle_since = 0.0
        self.is_reused = False
        self.has_answered = False
        """Whether any byte of the current response arrived."""

    # ---- used by the caller -----------------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def send(self, request: bytes, body: bytes, sink: ResponseSink) -> None:
        """Sends one request; the response goes to `sink`. The connection must be idle."""
        assert self._sink is None, "one request at a time"
        self.has_answered = False
        if self._transport is None or self._transport.is_closing():
            sink.broken(Cause.LOST, "connection closed by the engine")
            return
        self._sink, self._take, self._flush = sink, sink.body, sink.flush
        self._piped_chunk = self._take_chunk = None
        self._is_between_chunks = False
        self._parser = httptools.HttpResponseParser(self)
        self._headers, self._head_bytes = {}, 0
        self._is_head_done = self._is_until_close = False
        self._transport.writelines((request, body))

    def pipe(
        self, take: Callable[[bytes], None], flush: Callable[[], None], chunk: Callable[[bytes, int], None]
    ) -> None:
        """The rest of the body under way goes to these, past the sink, which is told of its end alone.

        A read that is one whole chunk with the end of an event at its end, which is how engines write their tokens,
        goes to `chunk` as it came, with the offset at which its data begins (two bytes follow them), past the parser.
        All else is parsed and goes to `take` piece by piece, and `flush` is called after each read.
        """
        self._take, self._flush, self._piped_chunk = take, flush, chunk

    def abort(self) -> None:
        """Closes at once and tells the sink nothing more. To an engine this is the order to abort the request."""
        self._sink = self._take_chunk = None
        if self._transport is not None:
            self._transport.abort()

    def pause(self) -> None:
        """Stops reading: the engine's send buffer fills and it stops too."""
        if self.is_open and self._transport is not None:
            self._is_paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        """Reads on."""
        if self._is_paused and self.is_open and self._transport is not None:
            self._is_paused = False
            self._transport.resume_reading()

    # ---- asyncio.Protocol -------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)

    def data_received(self, data: bytes) -> None:
        # Between two chunks a whole one leaves the parser as it is: it is the same whether it is fed or not.
        if self._take_chunk is not None and data.endswith(EVENT_CHUNK_END):
            size_line = _size_line(len(data))
            if size_line and data.startswith(size_line):
                self._take_chunk(data, len(size_line))
                return
        if self._sink is None or self._parser is None:
            self.abort()  # bytes nobody asked for
            return
        self.has_answered = True
        if not self._is_head_done:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(Cause.GARBAGE, f"not HTTP: {error}")
            return
        if not self._is_head_done and self._head_bytes > MAX_HEAD_BYTES:
            self._fail(Cause.GARBAGE, f"response head over {MAX_HEAD_BYTES} bytes")
        elif self._sink is not None:
            self._flush()
            # A rest that begins the next chunk's size line ends before its CRLF, or `on_chunk_header` was called.
            is_between = self._is_between_chunks and data.endswith(b"\r\n")
            self._take_chunk = self._piped_chunk if is_between else None

    def eof_received(self) -> bool:
        if self._is_until_close and self._sink is not None:
            sink, self._sink = self._sink, None
            sink.end()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._on_closed(self)
        if self._sink is not None:
            self._fail(Cause.LOST, str(exc) if exc else "connection closed by the engine")

    def _fail(self, cause: Cause, detail: str) -> None:
        sink = self._sink
        self.abort()
        if sink is not None:
            sink.broken(cause, detail)

    # ---- httptools callbacks ----------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._sink is None:  # a second answer to one request: whose the next bytes are cannot be known
            self.abort()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        status = self._parser.get_status_code()
        if status < 200:
            return
        self._is_head_done = True
        headers = self._headers
        self._is_until_close = b"content-length" not in headers and b"transfer-encoding" not in headers
        if self._sink is not None:
            self._sink.head(status, headers)

    def on_chunk_header(self) -> None:
        self._is_between_chunks = False

    def on_chunk_complete(self) -> None:
        self._is_between_chunks = True

    def on_body(self, data: bytes) -> None:
        if self._sink is not None:
            self._take(data)

    def on_message_complete(self) -> None:
        assert self._parser is not None
        if not self._is_head_done:  # an interim response (1xx): the real one follows
            self._headers = {}
            return
        sink, self._sink = self._sink, None
        if sink is None:
            return
        self._flush()
        self._piped_chunk = self._take_chunk = None
        self._take = self._flush = _ignore  # a sink that is done is not kept alive by an idle connection
        self.resume()  # a slow client's pause ends with its answer: the next request's answer is another's
        if self._parser.should_keep_alive() and self.is_open:
            self._on_idle(self)
        elif self._transport is not None:
            self._transport.close()
        sink.end()


def _ignore(*_: object) -> None:
    """Nobody listens."""


@lru_cache(maxsize=4096)
def _size_line(chunk_bytes: int) -> bytes:
    """The size line of a chunk of so many bytes in all, as engines and this gateway write it: lower case, no zeros in
    front, no extension. Empty where no chunk has so many, and for data too short to be an event's end."""
    for digits in range(1, 9):
        size_line = b"%x\r\n" % max(0, chunk_bytes - digits - 4)
        if len(size_line) == digits + 2:
            return size_line if chunk_bytes >= digits + 6 else b""
    return b""


@dataclass(frozen=True, slots=True)
class Address:
    """Where an engine listens."""

    host: str
    port: int
    is_tls: bool

    @staticmethod
    def of(url: str) -> Address:
        """From an http or https URL."""
        return _address_of(url)

    @property
    def host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@lru_cache(maxsize=4096)  # asked twice per call to an engine; parsing a URL takes 7 us
def _address_of(url: str) -> Address:
    parts = urlsplit(url)
    is_tls = parts.scheme == "https"
    return Address(parts.hostname or "", parts.port or (443 if is_tls else 80), is_tls)


class ConnectionPool:
    """Connections to one engine. Any number may be busy (the scheduler bounds requests); `max_idle` are kept."""

    def __init__(self, address: Address, *, keepalive_s: float, max_idle: int) -> None:
        self.address = address
        self._keepalive_s = keepalive_s
        self._max_idle = max_idle
        self._idle: deque[EngineConnection] = deque()
        self._open: set[EngineConnection] = set()
        self._loop = asyncio.get_running_loop()
        self._sweep: asyncio.TimerHandle | None = None
        self._ssl = ssl.create_default_context() if address.is_tls else None

    @property
    def open_count(self) -> int:
        return len(self._open)

    def idle(self) -> EngineConnection | None:
        """The connection used last, if one is idle and young enough; None otherwise."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open and self._loop.time() - connection.idle_since < self._keepalive_s:
                connection.is_reused = True
                return connection
            connection.abort()
        return None

    async def connect(self) -> EngineConnection:
        """A new connection. Raises OSError when the engine refuses it."""
        _, connection = await self._loop.create_connection(
            lambda: EngineConnection(self._became_idle, self._open.discard),
            self.address.host,
            self.address.port,
            ssl=self._ssl,
        )
        if connection.is_open:  # else the engine reset it already, and `send` will say so
            self._open.add(connection)
        return connection

    def retire(self) -> None:
        """Keeps no connection any more; those that are busy close when their answer ends."""
        self._max_idle = 0
        while self._idle:
            self._idle.popleft().abort()

    def close(self) -> None:
        """Aborts every connection, busy ones too."""
        if self._sweep is not None:
            self._sweep.cancel()
        for connection in list(self._open):
            connection.abort()
        self._idle.clear()

    def _became_idle(self, connection: EngineConnection) -> None:
        connection.idle_since = self._loop.time()
        self._idle.append(connection)
        if len(self._idle) > self._max_idle:
            self._idle.popleft().abort()
        if self._sweep is None:
            self._sweep = self._loop.call_later(self._keepalive_s, self._drop_old)

    def _drop_old(self) -> None:
        oldest_at = self._loop.time() - self._keepalive_s
        while self._idle and self._idle[0].idle_since <= oldest_at:
            self._idle.popleft().abort()
        self._sweep = self._loop.call_later(self._keepalive_s, self._drop_old) if self._idle else None
