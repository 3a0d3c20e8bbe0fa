"""The floor: what uvloop and httptools cost when a proxy does nothing at all with what passes through.

`python -m loadtest.byte_pump --port 8300 --engine http://127.0.0.1:8101`. Requests are framed (their end has to be
known) and sent on as they came to one engine; answers are framed for their end only and written as they came. No
routing, no bounds, no time-outs, no failure handled but by hanging up: no proxy to use, a figure to compare with.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
from collections.abc import Sequence
from typing import cast
from urllib.parse import urlsplit

import httptools
import uvloop


class _Upstream(asyncio.Protocol):
    """A connection to the engine, lent to one client at a time."""

    def __init__(self) -> None:
        self._client: _Client | None = None

    def send(self, request: bytes, client: _Client) -> None:
        self._client = client
        self._parser = httptools.HttpResponseParser(self)
        self._transport.write(request)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._client is not None:
            self._client.transport.close()

    def data_received(self, data: bytes) -> None:
        if self._client is not None:
            self._client.transport.write(data)
            self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        if self._client is not None:
            client, self._client = self._client, None
            client.pool.append(self)

    @property
    def is_open(self) -> bool:
        return not self._transport.is_closing()


class _Client(asyncio.Protocol):
    """A client connection."""

    def __init__(self, pools: Sequence[tuple[str, int, list[_Upstream]]], turns: itertools.count[int]) -> None:
        self._pools = pools
        self._turns = turns
        self._parser = httptools.HttpRequestParser(self)
        self._pieces: list[bytes] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._pieces.append(data)
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        request = b"".join(self._pieces)
        self._pieces.clear()
        host, port, self.pool = self._pools[next(self._turns) % len(self._pools)]
        while self.pool:
            if (upstream := self.pool.pop()).is_open:
                upstream.send(request, self)
                return
        task = asyncio.create_task(self._connect(host, port, request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, host: str, port: int, request: bytes) -> None:
        _, upstream = await asyncio.get_running_loop().create_connection(_Upstream, host, port)
        upstream.send(request, self)


async def serve(port: int, engines: Sequence[str]) -> None:
    """Pumps until the process ends."""
    parts = [urlsplit(engine) for engine in engines]
    pools: list[tuple[str, int, list[_Upstream]]] = [(part.hostname or "", part.port or 80, []) for part in parts]
    turns = itertools.count()
    await asyncio.get_running_loop().create_server(lambda: _Client(pools, turns), "127.0.0.1", port, backlog=4096)
    await asyncio.Event().wait()


def main(words: Sequence[str]) -> int:
    """Serves until it is stopped."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.byte_pump", description="The floor of a proxy's cost.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--engine", metavar="URL", action="append", required=True)
    flags = parser.parse_args(words)
    uvloop.run(serve(flags.port, flags.engine))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
