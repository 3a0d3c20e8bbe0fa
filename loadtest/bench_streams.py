"""Thousands of streams at once through one gateway process: memory per stream, streams lost, delay added to each token.

The engines are a process of their own and the client is this one. Each engine takes up to 1,024 streams, as vLLM does
by default on a large GPU, and gives all of them a token per step, so tokens come in bursts of that size. A token tells
the instant at which the engine wrote it; its delay is the time from there to the client's read, on one clock, and what
the gateway adds is the difference to the same streams without it. A process that holds n streams needs 2 n file
descriptors: where the limit is lower, fewer streams are opened, and the report says so.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

import uvloop

from gateway.core.errors import GatewayError
from loadtest.arguments import positive, positive_int
from loadtest.bench_relay import quantile
from loadtest.lean_engine import MODEL, STAMP
from loadtest.processes import await_answer, cpu_s, free_port, python, resident_bytes, started, told

BATCH = 1024
"""Streams of one engine. Source: vLLM 0.32.0, default of `max_num_seqs` on a GPU of 70 GB or more."""
SPARE_FILES = 200
"""Descriptors for everything but streams: probes, logs, libraries."""
OPENED_PER_S = 400.0
"""Streams opened a second: deciding on many at once is the matter of another bench."""
OPENED_AT_ONCE = 50
STAMP_DIGITS = 19
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "stream": True, "max_tokens": 1_000_000}
"""No stream ends before it is hung up: one that does is lost, and so is one that got nothing in the last steps."""
QUIET_STEPS = 3
HEAD_BYTES = 200
"""At least so many bytes of an answer hold its status."""


@dataclass(slots=True)
class Seen:
    """What the client saw of all streams."""

    delays_s: list[float] = field(default_factory=list)
    """Of tokens that were written while all streams were open."""
    counts_from_ns: int = 2**63
    open: int = 0
    lost: int = 0
    is_over: bool = False
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Figures:
    """What came out."""

    streams: int
    asked_streams: int
    """More than `streams` where the limit of file descriptors is too low."""
    seconds: float
    step_s: float
    opened_in_s: float
    lost: int
    """Ended early, or without a token in the last three steps."""
    bytes_per_stream: float
    """Resident memory of the gateway with all streams open less that before, per stream."""
    cpu_us_per_token: float
    """Processor time of the gateway while all streams were open."""
    cpu_ratio: float
    delay_p50_ms: float
    delay_p99_ms: float
    direct_p50_ms: float
    direct_p99_ms: float
    added_p50_ms: float
    added_p99_ms: float


class _Stream(asyncio.Protocol):
    """One stream, from its request until it is hung up."""

    def __init__(self, request: bytes, seen: Seen) -> None:
        self._request = request
        self._seen = seen
        self._is_answered = False
        self.last_ns = 0
        """When its last token was read."""

    def close(self) -> None:
        """Hangs up."""
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if not self._is_answered:
            self._is_answered = True
            self._seen.open += 1
            if not data.startswith(b"HTTP/1.1 200"):
                self._seen.failures = [*self._seen.failures[:4], data[:HEAD_BYTES].decode("latin-1")]
        self.last_ns = now_ns = time.monotonic_ns()
        at = data.find(STAMP)
        while at >= 0:
            at += len(STAMP)
            written_ns = int(data[at : at + STAMP_DIGITS])
            if written_ns >= self._seen.counts_from_ns:
                self._seen.delays_s.append((now_ns - written_ns) / 1e9)
            at = data.find(STAMP, at)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._seen.is_over:
            self._seen.open -= self._is_answered
            self._seen.lost += 1


def main(argv: Sequence[str]) -> int:
    """Runs the bench and prints a table, or JSON with `--json`; returns 1 when a stream was lost."""
    parser = argparse.ArgumentParser(prog="sluice bench streams", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--streams", type=positive_int, default=10_000)
    parser.add_argument("--seconds", type=positive, default=60.0, help="with all streams open (default 60)")
    parser.add_argument("--step-s", type=positive, default=2.0, help="seconds per token of a stream (default 2)")
    flags = parser.parse_args(argv)
    figures = measure(flags.streams, flags.seconds, flags.step_s)
    print(json.dumps(asdict(figures), indent=2) if flags.json else render(figures))
    return 1 if figures.lost else 0


def possible(streams: int) -> int:
    """How many of the streams the limit of open files allows one process; raises the soft limit as far as it may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * streams + SPARE_FILES
    limit = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    if limit > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))  # children inherit it
    return min(streams, (max(soft, limit) - SPARE_FILES) // 2)


def measure(streams: int, seconds: float, step_s: float) -> Figures:
    """The figures for that many streams, open together for that long."""
    asked, streams = streams, possible(streams)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        engine_count = -(-streams // BATCH)
        ports = ["--port", "0"] * engine_count
        command = python("loadtest.lean_engine", *ports, "--step-s", str(step_s), "--stamps")
        engines = [
            f"http://127.0.0.1:{port}" for port in told(stack.enter_context(started(command, talks=True)))["ports"]
        ]
        port = free_port()
        config = Path(folder) / "sluice.toml"
        config.write_text(gateway_config(port, engines, streams))
        log = Path(folder) / "log"
        gateway = stack.enter_context(started(python("gateway", "serve", "--config", str(config)), log=log))
        url = f"http://127.0.0.1:{port}"
        await_answer(url + "/ready", gateway, log)
        direct, *_ = uvloop.run(_hold(engines, streams, min(seconds, 10 * step_s), step_s, None))
        seen, used_bytes, used_s, held_s, opened_in_s = uvloop.run(_hold([url], streams, seconds, step_s, gateway.pid))
        if seen.failures:
            print(f"failures: {seen.failures}\n{log.read_text()[-1000:]}", file=sys.stderr)
    p50, p99, d50, d99 = (quantile(each.delays_s, ratio) * 1e3 for each in (seen, direct) for ratio in (0.5, 0.99))
    return Figures(
        streams=streams,
        asked_streams=asked,
        seconds=held_s,
        step_s=step_s,
        opened_in_s=opened_in_s,
        lost=seen.lost,
        bytes_per_stream=used_bytes / streams,
        cpu_us_per_token=used_s / (streams * held_s / step_s) * 1e6,
        cpu_ratio=used_s / held_s,
        delay_p50_ms=p50,
        delay_p99_ms=p99,
        direct_p50_ms=d50,
        direct_p99_ms=d99,
        added_p50_ms=p50 - d50,
        added_p99_ms=p99 - d99,
    )


def gateway_config(port: int, engines: Sequence[str], streams: int) -> str:
    """Settings of a gateway that takes so many streams at once."""
    lines = [f"[server]\nport = {port}\nmax_connections = {streams + 100}\n\n[log]\nformat = 'json'\nlevel = 'warning'"]
    lines.append(f"\n[tokens]\nask_engine = false\n\n[admission]\nmax_in_flight_per_engine = {streams}")
    lines.append("\n[engine_client]\nidle_timeout_s = 60.0")
    lines.append("\n[watch]\nreport_interval_s = 5.0\nreport_stale_s = 15.0\nhealth_interval_s = 5.0")
    lines += [f"\n[[engines]]\nurl = '{url}'" for url in engines]
    return "\n".join(lines) + "\n"


async def _hold(
    urls: Sequence[str], streams: int, seconds: float, step_s: float, pid: int | None
) -> tuple[Seen, int, float, float, float]:
    """Opens the streams, holds and closes them: what was seen; bytes, processor time, held and opening seconds."""
    loop = asyncio.get_running_loop()
    seen = Seen()
    before_bytes = resident_bytes(pid) if pid is not None else 0
    began_at = loop.time()
    held: list[_Stream | None] = []
    for first in range(0, streams, OPENED_AT_ONCE):
        await asyncio.sleep(max(0.0, began_at + first / OPENED_PER_S - loop.time()))
        numbers = range(first, min(first + OPENED_AT_ONCE, streams))
        held += await asyncio.gather(*(_open(urls[number % len(urls)], seen) for number in numbers))
    await _until_open(seen, streams)
    seen.counts_from_ns, held_at = time.monotonic_ns(), loop.time()
    used_bytes, before_s = 0, cpu_s(pid) if pid is not None else 0.0
    while (left_s := held_at + seconds - loop.time()) > 0:
        await asyncio.sleep(min(1.0, left_s))
        used_bytes = max(used_bytes, resident_bytes(pid) - before_bytes if pid is not None else 0)
    held_s, used_s = loop.time() - held_at, cpu_s(pid) - before_s if pid is not None else 0.0
    seen.is_over = True
    quiet_ns = time.monotonic_ns() - int(QUIET_STEPS * step_s * 1e9)
    seen.lost += sum(stream is not None and stream.last_ns < quiet_ns for stream in held)
    for stream in held:
        if stream is not None:
            stream.close()
    return seen, used_bytes, used_s, held_s, held_at - began_at


async def _until_open(seen: Seen, streams: int) -> None:
    """Returns when every stream has begun. Raises GatewayError when that takes too long."""
    ends_at = time.monotonic() + 2 * streams / OPENED_PER_S + 120
    while seen.open + seen.lost < streams:
        await asyncio.sleep(0.05)
        if time.monotonic() > ends_at:
            raise GatewayError(f"only {seen.open} of {streams} streams opened, {seen.lost} were lost: {seen.failures}")


async def _open(url: str, seen: Seen) -> _Stream | None:
    parts = urlsplit(url)
    body = json.dumps(BODY).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: application/json\r\n"
    request = head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body
    loop = asyncio.get_running_loop()
    try:
        made = await loop.create_connection(lambda: _Stream(request, seen), parts.hostname or "", parts.port or 80)
    except OSError as error:
        seen.lost += 1
        seen.failures = [*seen.failures[:4], str(error)]
        return None
    return made[1]


def render(figures: Figures) -> str:
    """A table for people."""
    fewer = (
        "" if figures.streams == figures.asked_streams else f" ({figures.asked_streams} asked; open files are limited)"
    )
    rows = [
        ("streams at once", f"{figures.streams}{fewer}"),
        ("held for", f"{figures.seconds:.0f} s, a token per {figures.step_s:g} s each"),
        ("opened in", f"{figures.opened_in_s:.0f} s"),
        ("lost", f"{figures.lost}"),
        ("memory per stream", f"{figures.bytes_per_stream:,.0f} bytes"),
        ("processor time", f"{figures.cpu_us_per_token:.1f} us per token, {figures.cpu_ratio:.0%} of a core"),
        ("delay per token", f"p50 {figures.delay_p50_ms:.2f} ms, p99 {figures.delay_p99_ms:.2f} ms"),
        ("the same, direct", f"p50 {figures.direct_p50_ms:.2f} ms, p99 {figures.direct_p99_ms:.2f} ms"),
        ("added", f"p50 {figures.added_p50_ms:.2f} ms, p99 {figures.added_p99_ms:.2f} ms"),
    ]
    return "\n".join(f"{name:<20}{value}" for name, value in rows)
