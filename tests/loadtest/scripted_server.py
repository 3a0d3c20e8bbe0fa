"""A small HTTP server whose answers are scripts: each gets the request's body and the raw connection."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nx-sluice-pair: p0/d1\r\nserver: x\r\n"
CLOSE = b"connection: close\r\n\r\n"
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Received:
    """One request as the server saw it."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]


Script: TypeAlias = Callable[[Received, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class ScriptedServer:
    """Where it listens and what it has received."""

    url: str
    received: list[Received] = field(default_factory=list)


def event(text: str = "", **members: Any) -> bytes:
    """One chat chunk as an SSE event; without text it has an empty delta."""
    chunk = {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": text}}]} | members
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def answer(status: int, body: bytes, headers: bytes = b"") -> Script:
    """A whole answer with a content length."""

    async def play(_: Received, writer: asyncio.StreamWriter) -> None:
        length = b"content-length: %d\r\n" % len(body)
        writer.write(b"HTTP/1.1 %d X\r\n" % status + headers + length + CLOSE + body)

    return play


def stream(*parts: bytes) -> Script:
    """A 200 event stream of these bytes that ends by closing the connection in order."""

    async def play(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + CLOSE + b"".join(parts))

    return play


@asynccontextmanager
async def serve(script: Script) -> AsyncIterator[ScriptedServer]:
    """A server on a free loopback port that plays the script for every request."""

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            received = await _receive(reader)
            state.received.append(received)
            await script(received, writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(converse, "127.0.0.1", 0)
    state = ScriptedServer(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    async with server:
        yield state


async def _receive(reader: asyncio.StreamReader) -> Received:
    head, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = await reader.readexactly(int(headers["content-length"]))
    return Received(head.split()[1], headers, json.loads(body))
