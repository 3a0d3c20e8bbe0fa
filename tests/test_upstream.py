from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.base import Cause
from gateway.upstream import MAX_HEAD_BYTES, Address, ConnectionPool, EngineConnection, _size_line
from tests.polling import until

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi"
HEAD = b"POST / HTTP/1.1\r\nhost: e\r\ncontent-length: 1\r\n\r\n"
Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Sink:
    """Writes down what a response was."""

    status: int = 0
    headers: dict[bytes, bytes] = field(default_factory=dict)
    data: bytes = b""
    flushes: int = 0
    ending: str | Cause = ""
    on_flush: Callable[[], None] = lambda: None
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def head(self, status: int, headers: dict[bytes, bytes]) -> None:
        self.status, self.headers = status, headers

    def body(self, data: bytes) -> None:
        self.data += data

    def flush(self) -> None:
        self.flushes += 1
        self.on_flush()

    def end(self) -> None:
        assert not self.ending, "a response ends once"
        self.ending = "end"
        self.over.set()

    def broken(self, cause: Cause, detail: str) -> None:
        assert not self.ending, "a response ends once"
        self.ending = cause
        self.over.set()


@dataclass
class Engine:
    """A server of scripted bytes on loopback, and the pool of connections to it."""

    pool: ConnectionPool
    server: asyncio.Server
    accepted: int = 0

    async def ask(self, connection: EngineConnection | None = None, **fields: Callable[[], None]) -> Sink:
        """A response on this connection, or on an idle or new one."""
        connection = connection or self.pool.idle() or await self.pool.connect()
        sink = Sink(**fields)
        connection.send(HEAD, b"x", sink)
        async with asyncio.timeout(3):
            await sink.over.wait()
        return sink


@pytest.fixture
async def serve():
    """Starts an engine: `await serve(b"bytes per request", ...)`, one connection per script, the last repeated."""
    engines: list[Engine] = []

    async def start(*answers: bytes, closes: bool = False, keepalive_s: float = 5.0, max_idle: int = 4) -> Engine:
        async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            engine.accepted += 1
            try:
                for number in range(100):
                    await reader.readexactly(len(HEAD) + 1)
                    writer.write(answers[min(number, len(answers) - 1)])
                    if closes:
                        break
            except (asyncio.IncompleteReadError, ConnectionError):
                pass
            finally:
                writer.close()

        server = await asyncio.start_server(converse, "127.0.0.1", 0)
        address = Address("127.0.0.1", server.sockets[0].getsockname()[1], False)
        engine = Engine(ConnectionPool(address, keepalive_s=keepalive_s, max_idle=max_idle), server)
        engines.append(engine)
        return engine

    yield start
    for engine in engines:
        engine.pool.close()
        engine.server.close()
    await until(lambda: all(engine.pool.open_count == 0 for engine in engines))


async def test_a_response_is_told_in_pieces_and_its_connection_used_again(serve):
    engine = await serve(OK)
    for _ in range(3):
        sink = await engine.ask()
        assert (sink.status, sink.data, sink.ending) == (200, b"hi", "end")
        assert sink.headers == {b"content-length": b"2"}
    assert (engine.accepted, engine.pool.open_count) == (1, 1)


@pytest.mark.parametrize(
    ("answer", "closes", "data"),
    [
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n1\r\n!\r\n0\r\n\r\n", False, b"hi!"),
        (b"HTTP/1.1 200 OK\r\n\r\nuntil the end", True, b"until the end"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nlink: x\r\n\r\n" + OK, False, b"hi"),
        (b"HTTP/1.0 200 OK\r\n\r\nold", True, b"old"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", False, b""),
    ],
    ids=["chunked", "until close", "interim", "1.0", "empty"],
)
async def test_every_framing_is_understood(serve, answer, closes, data):
    sink = await (await serve(answer, closes=closes)).ask()
    assert (sink.data, sink.ending) == (data, "end")
    assert b"link" not in sink.headers


@pytest.mark.parametrize(
    ("answer", "closes", "cause"),
    [
        (b"", True, Cause.LOST),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhi", True, Cause.LOST),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n", True, Cause.LOST),
        (b"220 smtp.example.org ESMTP\r\n", False, Cause.GARBAGE),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n", False, Cause.GARBAGE),
        (b"HTTP/1.1 200 OK\r\nx: " + b"y" * (MAX_HEAD_BYTES + 300_000), False, Cause.GARBAGE),
        (b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\nzz", False, Cause.GARBAGE),
    ],
    ids=["nothing", "short", "no last chunk", "smtp", "bad chunk", "endless head", "upgrade"],
)
async def test_what_is_not_a_whole_response_is_broken_and_its_connection_closed(serve, answer, closes, cause):
    engine = await serve(answer, closes=closes)
    sink = await engine.ask()
    assert sink.ending is cause
    assert engine.pool.idle() is None


async def test_a_connection_that_the_engine_will_close_is_not_kept(serve):
    engine = await serve(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nhi")
    await engine.ask()
    assert engine.pool.idle() is None


async def test_an_aborted_response_tells_its_sink_nothing_more(serve):
    engine = await serve(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhi")
    connection, sink = await engine.pool.connect(), Sink()
    connection.send(HEAD, b"x", sink)
    await until(lambda: bool(sink.data))
    connection.abort()
    connection.abort()
    await until(lambda: engine.pool.open_count == 0)
    assert sink.ending == ""


async def test_a_paused_connection_is_read_again_by_its_next_request(serve):
    """The last bytes of an answer may meet a slow client: the pause must not stay on the connection."""
    engine = await serve(OK)
    connection = await engine.pool.connect()
    first = await engine.ask(connection, on_flush=connection.pause)
    assert first.data == b"hi"
    assert (await engine.ask()).data == b"hi"
    assert engine.accepted == 1


async def test_a_paused_connection_reads_nothing_until_it_is_resumed(serve):
    engine = await serve(b"HTTP/1.1 200 OK\r\ncontent-length: 10000000\r\n\r\n" + b"x" * 10_000_000)
    connection, sink = await engine.pool.connect(), Sink()
    sink.on_flush = lambda: connection.pause() if len(sink.data) < 9_000_000 and sink.flushes == 1 else None
    connection.send(HEAD, b"x", sink)
    await until(lambda: bool(sink.flushes))
    seen = len(sink.data)
    await asyncio.sleep(0.05)
    assert len(sink.data) == seen < 10_000_000
    connection.resume()
    async with asyncio.timeout(3):
        await sink.over.wait()
    assert (len(sink.data), sink.ending) == (10_000_000, "end")


@pytest.mark.parametrize("rest", [OK, OK[:20], b"garbage"], ids=["whole", "half", "garbage"])
async def test_bytes_after_an_answer_close_the_connection(serve, rest):
    engine = await serve(OK + rest)
    assert (await engine.ask()).data == b"hi"
    assert engine.pool.idle() is None


async def test_bytes_that_nobody_asked_for_close_an_idle_connection(serve):
    engine = await serve(OK)
    connection = await engine.pool.connect()
    await engine.ask(connection)
    connection.data_received(OK)
    assert engine.pool.idle() is None


# ---- the pool --------------------------------------------------------------------------------------------------------


async def test_idle_connections_are_dropped_before_the_engine_does(serve):
    engine = await serve(OK, keepalive_s=0.05)
    await engine.ask()
    assert engine.pool.open_count == 1
    await until(lambda: engine.pool.open_count == 0)


async def test_at_most_so_many_connections_stay_idle(serve):
    engine = await serve(OK, max_idle=2)
    connections = [await engine.pool.connect() for _ in range(5)]
    await asyncio.gather(*map(engine.ask, connections))
    await until(lambda: engine.pool.open_count == 2)


async def test_a_connection_that_the_engine_closed_while_idle_is_gone_from_the_pool(serve):
    engine = await serve(OK, closes=True)
    await engine.ask()
    await until(lambda: engine.pool.open_count == 0)
    assert engine.pool.idle() is None


async def test_a_retired_pool_lets_answers_end_and_keeps_nothing(serve):
    engine = await serve(OK)
    await engine.ask()
    busy, sink = await engine.pool.connect(), Sink()
    engine.pool.retire()
    assert engine.pool.idle() is None
    busy.send(HEAD, b"x", sink)
    async with asyncio.timeout(3):
        await sink.over.wait()
        await until(lambda: engine.pool.open_count == 0)
    assert sink.data == b"hi"


async def test_a_cancelled_connect_leaves_no_connection(serve):
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        address = Address("127.0.0.1", full.getsockname()[1], False)
        pool = ConnectionPool(address, keepalive_s=1.0, max_idle=1)
        tasks = [asyncio.create_task(pool.connect()) for _ in range(8)]
        await asyncio.sleep(0.02)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        pool.close()
        await until(lambda: pool.open_count == 0)


async def test_an_engine_that_resets_at_once_is_an_error_of_the_connection_and_no_leak():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        address = Address("127.0.0.1", listener.getsockname()[1], False)
        pool = ConnectionPool(address, keepalive_s=1.0, max_idle=1)
        connection = await pool.connect()
        accepted, _ = await asyncio.get_running_loop().sock_accept(listener)
        accepted.close()
        await until(lambda: not connection.is_open)
        sink = Sink()
        connection.send(HEAD, b"x", sink)
        assert (sink.ending, pool.open_count) == (Cause.LOST, 0)


@pytest.mark.parametrize(
    ("url", "address", "host_header"),
    [
        ("http://e:8000", Address("e", 8000, False), "e:8000"),
        ("https://e", Address("e", 443, True), "e:443"),
        ("http://[::1]:80", Address("::1", 80, False), "[::1]:80"),
    ],
)
def test_an_address_comes_from_a_url(url, address, host_header):
    assert Address.of(url) == address
    assert address.host_header == host_header


async def test_a_body_that_is_piped_passes_the_sink_by_and_only_until_its_answer_ends(serve):
    engine = await serve(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n1\r\n!\r\n0\r\n\r\n", OK)
    connection, piped, flushed = await engine.pool.connect(), [], []
    sink = Sink()
    connection.send(HEAD, b"x", sink)
    connection.pipe(piped.append, lambda: flushed.append(len(piped)), no_chunk)
    async with asyncio.timeout(3):
        await sink.over.wait()
    assert (b"".join(piped), sink.data, sink.ending) == (b"hi!", b"", "end")
    assert flushed[-1] == len(piped)
    after = await engine.ask(connection)
    assert (after.data, after.ending, b"".join(piped)) == (b"hi", "end", b"hi!")


def no_chunk(framed: bytes, start: int) -> None:
    raise AssertionError(f"{framed!r} came as a whole chunk")


CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
EVENT = b"data: {}\n\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Nowhere(asyncio.Transport):
    """A transport that sends nothing: each read is what a test says it is."""

    def writelines(self, list_of_data) -> None:
        pass

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        pass

    def abort(self) -> None:
        pass


@dataclass
class Reads:
    """An answer that is piped, given read by read."""

    sink: Sink = field(default_factory=Sink)
    pieces: list[bytes] = field(default_factory=list)
    chunks: list[bytes] = field(default_factory=list)
    all: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.connection = EngineConnection(lambda idle: None, lambda closed: None)
        self.connection.connection_made(Nowhere())
        self.connection.send(HEAD, b"x", self.sink)
        self.connection.data_received(CHUNKED)
        self.connection.pipe(self.piece, lambda: None, self.chunk)

    def piece(self, data: bytes) -> None:
        self.pieces.append(data)
        self.all.append(data)

    def chunk(self, framed: bytes, start: int) -> None:
        self.chunks.append(framed[start:-2])
        self.all.append(framed[start:-2])


def read(*reads: bytes) -> Reads:
    answer = Reads()
    for each in reads:
        answer.connection.data_received(each)
    return answer


def test_a_read_that_is_one_whole_chunk_passes_the_parser_by():
    events = [b"data: %b\n\n" % (b"x" * size) for size in (1, 7, 8, 200, 240, 4_070, 5_000)]
    answer = read(chunk(EVENT), *map(chunk, events), b"0\r\n\r\n")
    assert (answer.pieces, answer.chunks, answer.sink.ending) == ([EVENT], events, "end")


@pytest.mark.parametrize(
    ("reads", "data"),
    [
        ([chunk(EVENT)[:5], chunk(EVENT)[5:]], EVENT),
        ([chunk(EVENT)[:-1], b"\n"], EVENT),
        ([chunk(EVENT) + chunk(EVENT)], EVENT + EVENT),
        ([chunk(b"data: half"), chunk(b" an event\n\n")[:-2], b"\r\n"], b"data: half an event\n\n"),
        ([chunk(EVENT) + b"a\r\n", EVENT + b"\r\n"], EVENT + EVENT),
        ([b"0A\r\n" + EVENT + b"\r\n"], EVENT),
        ([b"A\r\n" + EVENT + b"\r\n"], EVENT),
        ([b"a;x=y\r\n" + EVENT + b"\r\n"], EVENT),
        ([chunk(b"data: a\r\n\r\n")], b"data: a\r\n\r\n"),
        ([chunk(b"\n")], b"\n"),
    ],
)
def test_what_is_not_one_whole_chunk_of_events_is_parsed(reads, data):
    first, then, last = b"data: first\n\n", b"data: then\n\n", b"data: last\n\n"
    answer = read(chunk(first), *reads, chunk(then), chunk(last), b"0\r\n\r\n")
    assert (b"".join(answer.all), answer.sink.ending) == (first + data + then + last, "end")
    assert answer.chunks in ([last], [then, last])  # after a cut CRLF the parser takes one chunk more


@pytest.mark.parametrize("size", [b"+a", b"0xa", b"1_0", b" a", b"9", b"-a", b"ffffffffffffffffff"])
def test_a_size_that_is_none_is_refused_by_the_parser(size):
    answer = read(chunk(EVENT), size + b"\r\n" + EVENT + b"\r\n", chunk(EVENT))
    assert (answer.chunks, answer.sink.ending) == ([], Cause.GARBAGE)


def test_after_its_end_or_an_abort_an_answer_gives_no_chunks():
    ended = read(chunk(EVENT), b"0\r\n\r\n", chunk(EVENT))
    assert (ended.chunks, ended.sink.ending) == ([], "end")
    aborted = read(chunk(EVENT), chunk(EVENT))
    aborted.connection.abort()
    aborted.connection.data_received(chunk(EVENT))
    assert aborted.chunks == [EVENT]


@given(
    st.lists(st.sampled_from([EVENT, EVENT * 30, b"data: a\n", b"\n", b"\n\n", b"data: b\r\n\r\n"]), max_size=12),
    st.lists(st.integers(0, 5_000), max_size=12),
)
def test_however_an_answer_was_cut_its_data_are_the_same_and_in_order(datas, cuts):
    raw = b"".join(map(chunk, datas)) + b"0\r\n\r\n"
    ends = sorted({cut % len(raw) for cut in cuts} | {len(raw)})
    answer = read(*[raw[start:end] for start, end in zip([0, *ends], ends, strict=False) if end > start])
    assert (b"".join(answer.all), answer.sink.ending) == (b"".join(datas), "end")


def test_the_size_line_of_a_chunk_is_told_by_its_bytes_in_all():
    """A chunk of 16 bytes has 22 in all, one of 15 has 20; none has 21."""
    sizes = {len(chunk(b"x" * size)): size for size in range(2, 70_000)}
    told = {total: _size_line(total) for total in range(70_000)}
    assert {total: int(line, 16) for total, line in told.items() if line} == {
        total: size for total, size in sizes.items() if total < 70_000
    }
