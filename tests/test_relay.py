from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import pytest
from aiohttp import web

from adapters.base import Call, Leg
from adapters.sse import MAX_EVENT_BYTES
from gateway.core.types import Engine, Role
from gateway.dispatch import StreamEnd
from gateway.engine_call import CallLimits, EngineCall, last_boundary
from gateway.relay import PROGRESS_EVENTS, StreamRelay
from gateway.upstream import Address, ConnectionPool
from tests.integration.harness import RawClient, head_and_body
from tests.integration.scripted_engine import CHUNKED, DONE, ScriptedEngine, chunk, says, serving, token
from tests.polling import until

LIMITS = CallLimits(connect_timeout_s=1.0, first_event_timeout_s=2.0, answer_timeout_s=2.0, max_response_bytes=2**24)
HEAD = b"POST / HTTP/1.1\r\nhost: e\r\ncontent-length: 2\r\n\r\n"
USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}\n\n'


@dataclass
class Bench:
    """One relay between a scripted engine and a raw client."""

    engine: ScriptedEngine
    port: int
    ends: list[StreamEnd | BaseException] = field(default_factory=list)
    progress: list[int] = field(default_factory=list)
    expects_done: bool = True
    idle_timeout_s: float = 0.3
    write_timeout_s: float = 0.3

    async def relay(self, script, *, version: bytes = b"1.1", reads: bool = True) -> tuple[bytes, StreamEnd]:
        """All that the client got and how it ended, for this stream of the engine."""
        self.engine.script = script
        async with RawClient(*await asyncio.open_connection("127.0.0.1", self.port)) as client:
            if not reads:
                client.writer.transport.pause_reading()
            client.send(b"GET / HTTP/%b\r\nhost: g\r\nconnection: close\r\n\r\n" % version)
            if not reads:
                await until(lambda: bool(self.ends))
                return b"", self.ends[-1]
            raw = await client.read_all()
        await until(lambda: bool(self.ends))
        return raw, self.ends[-1]


@pytest.fixture
async def bench():
    async with serving() as engine:
        pool = ConnectionPool(Address.of(engine.url), keepalive_s=2.0, max_idle=4)

        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            happened: asyncio.Queue[object] = asyncio.Queue()
            what = Call(Leg.DECODE, Engine("e", engine.url, Role.BOTH), "/", b"{}", is_answer=True)
            call = EngineCall(what, pool, LIMITS, happened.put_nowait, is_whole=False)
            await call.send(HEAD)
            await happened.get()
            response = web.StreamResponse(headers={"content-type": "text/event-stream"})
            relay = StreamRelay(
                request,
                call,
                idle_timeout_s=bench.idle_timeout_s,
                write_timeout_s=bench.write_timeout_s,
                expects_done=bench.expects_done,
                on_progress=bench.progress.append,
            )
            try:
                bench.ends.append(await relay.run(response))
            except BaseException as error:
                bench.ends.append(error)
                raise
            finally:
                call.close()
            return response

        runner = web.ServerRunner(web.Server(handle, handler_cancellation=True), shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        bench = Bench(engine, runner.addresses[0][1])
        yield bench
        await runner.cleanup()
        pool.close()
        await until(lambda: pool.open_count == 0)


def body_of(raw: bytes) -> bytes:
    """The body of a chunked response that is complete."""
    _, headers, body = head_and_body(raw)
    assert headers["transfer-encoding"] == "chunked"
    parts = []
    while True:
        size, _, body = body.partition(b"\r\n")
        if size == b"0":
            assert body == b"\r\n"
            return b"".join(parts)
        parts.append(body[: int(size, 16)])
        body = body[int(size, 16) + 2 :]


async def slowly(*parts: bytes) -> Callable[..., Awaitable[None]]:
    async def play(received, writer):
        for part in parts:
            writer.write(part)
            await asyncio.sleep(0.01)

    return play


async def test_bytes_go_through_as_they_are_and_usage_is_noted(bench):
    raw, end = await bench.relay(says(CHUNKED, *map(chunk, (token("a"), token("b"), USAGE, DONE)), b"0\r\n\r\n"))
    assert body_of(raw) == token("a") + token("b") + USAGE + DONE
    assert (end.output_tokens, end.prompt_tokens, end.failure) == (2, 5, None)


async def test_without_usage_the_events_are_counted_and_timed(bench):
    parts = (CHUNKED, *(chunk(token(text)) for text in "abcd"), chunk(DONE), b"0\r\n\r\n")
    _, end = await bench.relay(await slowly(*parts))
    assert end.output_tokens == 4
    assert 0.005 < end.tbt_s < 0.3


async def test_an_event_in_two_pieces_goes_out_whole(bench):
    event = token("abc")
    raw, end = await bench.relay(
        await slowly(CHUNKED + chunk(token("x") + event[:20]), chunk(event[20:] + DONE), b"0\r\n\r\n")
    )
    chunks = head_and_body(raw)[2].split(b"\r\n")
    assert all(part.endswith(b"\n\n") for part in chunks[1::2] if part)
    assert (body_of(raw), end.failure) == (token("x") + event + DONE, None)


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
async def test_chunks_one_by_one_are_the_same_as_all_at_once(bench, version):
    events = [token("a" * size) for size in (1, 30, 4_000)]
    torn = [token("torn")[:20], token("torn")[20:], b": quiet\n\n", b"data: {}\n\ndata: {}\n\n"]
    parts = [chunk(part) for part in (*events, *torn, *events, USAGE, DONE)]
    raw, end = await bench.relay(await slowly(CHUNKED, *parts, b"0\r\n\r\n"), version=version)
    body = body_of(raw) if version == b"1.1" else head_and_body(raw)[2]
    assert body == b"".join((*events, *torn, *events, USAGE, DONE))
    assert (end.output_tokens, end.prompt_tokens, end.failure) == (2, 5, None)
    at_once, same = await bench.relay(says(CHUNKED + b"".join(parts) + b"0\r\n\r\n"), version=version)
    assert body == (body_of(at_once) if version == b"1.1" else head_and_body(at_once)[2])
    assert (same.output_tokens, same.prompt_tokens) == (2, 5)


async def test_progress_is_told_now_and_then(bench):
    events = [chunk(token("x"))] * (3 * PROGRESS_EVENTS)
    await bench.relay(
        await slowly(CHUNKED, *[b"".join(events[n : n + 8]) for n in range(0, len(events), 8)], chunk(DONE))
    )
    assert bench.progress == [PROGRESS_EVENTS, 2 * PROGRESS_EVENTS, 3 * PROGRESS_EVENTS]


@pytest.mark.parametrize(
    ("parts", "failure"),
    [
        ([chunk(token("a")), b"0\r\n\r\n"], "ended early"),
        ([chunk(token("a")), chunk(b'data: {"half'), b"0\r\n\r\n"], "ended early"),
        ([chunk(token("a"))], "sent nothing for 0.3 s"),
        ([chunk(token("a")), chunk(b'data: {"error": {}}\n\n' + DONE), b"0\r\n\r\n"], "reported an error"),
    ],
    ids=["no done", "half", "silent", "error event"],
)
async def test_a_failure_is_one_error_event_after_whole_ones(bench, parts, failure):
    raw, end = await bench.relay(says(CHUNKED, *parts))
    assert failure in end.failure
    body = body_of(raw)
    assert body.startswith(token("a"))
    assert body.count(b'"error"') == 1
    assert b"half" not in body


async def test_an_event_over_the_bound_is_a_failure(bench):
    pieces = [chunk(b"x" * 2**20)] * (MAX_EVENT_BYTES // 2**20 + 1)
    raw, end = await bench.relay(await slowly(CHUNKED + chunk(token("a")), chunk(b"data: "), *pieces))
    assert "more than" in end.failure
    assert body_of(raw).count(b'"error"') == 1


async def test_a_stream_that_need_not_say_done_ends_when_it_ends(bench):
    bench.expects_done = False
    raw, end = await bench.relay(says(CHUNKED, chunk(token("a")), b"0\r\n\r\n"))
    assert (body_of(raw), end.failure) == (token("a"), None)


async def test_a_client_without_chunks_gets_the_plain_bytes(bench):
    raw, _ = await bench.relay(says(CHUNKED, chunk(token("a") + DONE), b"0\r\n\r\n"), version=b"1.0")
    assert head_and_body(raw)[2] == token("a") + DONE


async def test_a_client_that_reads_nothing_is_dropped_and_the_engine_told(bench):
    async def pour(received, writer):
        writer.write(CHUNKED)
        while True:
            writer.write(chunk(token("x" * 100_000)))
            await writer.drain()

    _, end = await bench.relay(pour, reads=False)
    assert isinstance(end, ConnectionError)
    await until(lambda: bench.engine.closed == 1)


@pytest.mark.parametrize(
    ("data", "end"),
    [
        (b"", 0),
        (b"data: a\n", 0),
        (b"data: a\n\n", 9),
        (b"data: a\n\ndata: b\n", 9),
        (b"data: a\r\n\r\ndata: b", 11),
        (b"data: a\r\rdata", 9),
        (b"a\n\nb\r\n\r\nc", 8),
    ],
)
def test_the_last_boundary_is_after_the_last_blank_line(data, end):
    assert last_boundary(data) == end
