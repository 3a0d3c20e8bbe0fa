"""An engine of scripted bytes: it is healthy, and does with generation requests what a test says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from gateway.config import EngineSettings
from gateway.core.types import Role
from tests.integration.harness import MODEL, Site
from tests.polling import until

METRICS = b"vllm:num_requests_running 0\nvllm:num_requests_waiting 0\n"
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
CHUNKED = STREAM_HEAD + b"transfer-encoding: chunked\r\n\r\n"
UNTIL_CLOSE = STREAM_HEAD + b"connection: close\r\n\r\n"
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Received:
    """One request as the engine saw it."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]


Script: TypeAlias = Callable[[Received, asyncio.StreamWriter], Awaitable[None]]


def whole(body: bytes, status: int = 200, content_type: bytes = b"application/json") -> bytes:
    """The bytes of a whole answer."""
    head = b"HTTP/1.1 %d X\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n"
    return head % (status, content_type, len(body)) + body


def chunk(data: bytes) -> bytes:
    """The bytes as one HTTP chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def token(text: str = "word", **delta: Any) -> bytes:
    """One event of a chat stream."""
    choice = {"index": 0, "delta": delta or {"content": text}, "finish_reason": None}
    return b"data: " + json.dumps({"object": "chat.completion.chunk", "choices": [choice]}).encode() + b"\n\n"


def text_answer(text: str = "word") -> bytes:
    """The body of a whole chat answer."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    return json.dumps({"object": "chat.completion", "choices": [choice], "usage": usage}).encode()


def says(*parts: bytes, closes: bool = False) -> Script:
    """Writes these bytes, then hangs up or waits for the next request."""

    async def play(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"".join(parts))
        await writer.drain()
        if closes:
            writer.close()

    return play


async def silence(_: Received, writer: asyncio.StreamWriter) -> None:
    """Never answers."""


@dataclass
class ScriptedEngine:
    """Where it listens, what it does and what it has received."""

    url: str
    script: Script
    probes: dict[str, bytes | None]
    """What it answers to the watch, by path; None: nothing."""
    received: list[Received] = field(default_factory=list)
    probed: dict[str, dict[str, str]] = field(default_factory=dict)
    """Headers of the last probe by path."""
    connections: int = 0
    """Generation connections made so far."""
    server: asyncio.Server = field(init=False)
    closed: int = 0
    """Of these, ended by the gateway or by a script."""

    def settings(self, engine_id: str, role: Role = Role.BOTH) -> EngineSettings:
        return EngineSettings(url=self.url, role=role, id=engine_id)

    async def is_up(self, site: Site) -> None:
        """Returns when every engine of the site is a candidate."""
        await until(lambda: bool(site.state.engines) and all(map(site.is_up, site.state.engines)))


@asynccontextmanager
async def serving(script: Script | None = None, *, model: str = MODEL) -> AsyncIterator[ScriptedEngine]:
    """An engine on a free loopback port. Without a script it gives a whole chat answer."""
    models = json.dumps({"object": "list", "data": [{"id": model, "object": "model", "max_model_len": 4096}]})
    probes: dict[str, bytes | None] = {"/health": b"", "/metrics": METRICS, "/v1/models": models.encode()}
    probes["/kv_event_sources"] = b"{}"

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        is_counted = False
        task = asyncio.current_task()
        assert task is not None
        conversations.add(task)
        try:
            while not writer.is_closing():
                received = await _receive(reader)
                if received.path in engine.probes:
                    engine.probed[received.path] = received.headers
                    if engine.probes[received.path] is None:
                        await reader.read()  # until the gateway hangs up
                        return
                    writer.write(whole(engine.probes[received.path], content_type=b"text/plain"))
                    continue
                engine.connections += not is_counted
                is_counted = True
                engine.received.append(received)
                await engine.script(received, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            conversations.discard(task)
            engine.closed += is_counted
            writer.close()

    conversations: set[asyncio.Task[None]] = set()
    server = await asyncio.start_server(converse, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    engine = ScriptedEngine(f"http://127.0.0.1:{port}", script or says(whole(text_answer())), probes)
    engine.server = server
    try:
        yield engine
    finally:
        server.close()
        for task in conversations:
            task.cancel()
        if conversations:
            await asyncio.wait(conversations)


async def _receive(reader: asyncio.StreamReader) -> Received:
    head, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Received(head.split()[1], headers, json.loads(body) if body else {})
