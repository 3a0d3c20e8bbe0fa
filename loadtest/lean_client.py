"""An open-loop client in a process of its own: requests leave at their instants, whatever became of those before.

`python -m loadtest.lean_client` reads one job per line as JSON (the fields of `Job`) and answers each with one line
(the fields of `Took`). Connections are kept between jobs. It parses no answer: it counts events by the mark that the
lean engine's tokens carry, so that it costs the machine little beside what is measured.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import uvloop

from loadtest.lean_engine import MARK

QUIET_S = 20.0
"""Seconds after the last request was sent at which answers that have not ended are counted as lost."""


@dataclass(frozen=True, slots=True)
class Job:
    """Requests to one address."""

    url: str
    count: int
    rate_per_s: float
    bodies: str
    """Path of a file with one request body a line; they are taken in turn from `first`."""
    first: int = 0
    path: str = "/v1/chat/completions"
    seed: int = 0


@dataclass(slots=True)
class Took:
    """What the requests of a job met with."""

    first_s: list[float] = field(default_factory=list)
    """From sending to the first token (streams), or to the whole answer."""
    completed: int = 0
    tokens: int = 0
    failed: int = 0
    failures: list[str] = field(default_factory=list)
    """The first few, in words."""


class _Exchange(asyncio.Protocol):
    """One connection: sends a request, tells when its first token came and when its answer ended."""

    def __init__(self, on_lost: Callable[[_Exchange], None]) -> None:
        self._on_lost = on_lost
        self._parser: Any = None
        self._done: Callable[[_Exchange, str | None], None] | None = None

    def send(self, request: bytes, sent_at: float, done: Callable[[_Exchange, str | None], None]) -> None:
        """Sends; `done` is called once, with what went wrong or None."""
        self.sent_at, self._done = sent_at, done
        self.first_at: float | None = None
        self.tokens = 0
        self._parser = httptools.HttpResponseParser(self)
        self._transport.write(request)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_lost(self)
        self._end("the connection was lost")

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(f"not HTTP: {error}")
            self._transport.abort()

    def on_body(self, body: bytes) -> None:
        count = body.count(MARK)
        if count and self.first_at is None:
            self.first_at = perf_counter()
        self.tokens += count

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if status == 100:
            return
        self._end(None if status == 200 else f"status {status}")

    def _end(self, failure: str | None) -> None:
        done, self._done = self._done, None
        if done is not None:
            done(self, failure)


class LeanClient:
    """Sends the jobs' requests."""

    def __init__(self) -> None:
        self._idle: dict[str, list[_Exchange]] = {}
        self._loop = asyncio.get_running_loop()

    async def run(self, job: Job) -> Took:
        """What the requests of the job met with, when all have ended or are lost."""
        bodies = await asyncio.to_thread(_bodies, job.bodies)
        rng = random.Random(job.seed)
        took = Took()
        is_over = asyncio.Event()
        tasks: set[asyncio.Task[None]] = set()
        due_at = self._loop.time() + 0.01
        for number in range(job.count):
            request = _request(job, bodies[(job.first + number) % len(bodies)])
            await asyncio.sleep(max(0.0, due_at - self._loop.time()))
            task = asyncio.create_task(self._send(job, request, took, is_over))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            due_at += rng.expovariate(job.rate_per_s)
        try:
            async with asyncio.timeout(QUIET_S):
                await is_over.wait()
        except TimeoutError:
            took.failed = job.count - took.completed
            took.failures.append(f"lost after {QUIET_S:g} s")
        return took

    async def _send(self, job: Job, request: bytes, took: Took, is_over: asyncio.Event) -> None:
        sent_at = perf_counter()  # the loop's own clock shows whole milliseconds
        idle = self._idle.setdefault(job.url, [])

        def done(exchange: _Exchange, failure: str | None) -> None:
            if failure is None and exchange.first_at is not None:
                took.completed += 1
                took.tokens += exchange.tokens
                took.first_s.append(exchange.first_at - exchange.sent_at)
                idle.append(exchange)
            else:
                took.failed += 1
                took.failures = [*took.failures[:4], failure or "no token came"]
            if took.completed + took.failed == job.count:
                is_over.set()

        while idle:
            exchange = idle.pop()
            if not exchange._transport.is_closing():
                exchange.send(request, sent_at, done)
                return
        parts = urlsplit(job.url)
        try:
            _, made = await self._loop.create_connection(
                lambda: _Exchange(self._lost), parts.hostname or "", parts.port or 80
            )
            made.send(request, sent_at, done)
        except OSError as error:
            took.failed += 1
            took.failures = [*took.failures[:4], str(error)]

    def _lost(self, exchange: _Exchange) -> None:
        for idle in self._idle.values():
            if exchange in idle:
                idle.remove(exchange)


def _bodies(path: str) -> list[bytes]:
    return Path(path).read_bytes().splitlines()


def _request(job: Job, body: bytes) -> bytes:
    host = urlsplit(job.url).netloc
    head = f"POST {job.path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\nuser-agent: sluice-bench\r\n"
    return head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body


async def _serve_jobs() -> None:
    client = LeanClient()
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        took = await client.run(Job(**json.loads(line)))
        print(json.dumps(asdict(took)), flush=True)


if __name__ == "__main__":
    uvloop.run(_serve_jobs())
