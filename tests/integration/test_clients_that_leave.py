"""Clients that leave or stop reading, at every stage: engines are told at once, and nobody else notices."""

from __future__ import annotations

import asyncio
import fcntl
import socket
import sys
import termios
from collections.abc import Callable
from functools import partial

import pytest

from gateway.config import AdmissionSettings, ServerSettings
from tests.integration.harness import RawClient, Site, a_post, chat_body, events, words
from tests.integration.scripted_engine import (
    CHUNKED,
    DONE,
    ScriptedEngine,
    chunk,
    says,
    serving,
    text_answer,
    token,
    whole,
)
from tests.polling import until

LONG = chat_body(words(100), max_tokens=20_000)


async def leave_when(site: Site, is_there: Callable[[], bool], *, is_stream: bool) -> None:
    async with await RawClient.to(site) as client:
        client.send(a_post(LONG | {"stream": is_stream}))
        await until(is_there)
        client.abort()
        await site.assert_clean()


both_ways = pytest.mark.parametrize("is_stream", [True, False], ids=["stream", "whole"])


@both_ways
async def test_a_client_that_leaves_during_the_prefill_frees_it(pair, is_stream):
    pair["p0"].freeze()
    await leave_when(pair, lambda: pair.busy("p0") == 1, is_stream=is_stream)


@both_ways
async def test_a_client_that_leaves_between_prefill_and_first_token_frees_both(pair, is_stream):
    pair["d0"].freeze()
    await leave_when(pair, lambda: pair.busy("d0") == 1, is_stream=is_stream)


@both_ways
async def test_a_client_that_leaves_while_tokens_come_frees_decode(pair, is_stream):
    await leave_when(pair, lambda: pair["d0"].engine.counters.generated_tokens > 20, is_stream=is_stream)


@both_ways
async def test_a_client_that_leaves_while_it_waits_gives_up_its_place(start, is_stream):
    site = await start("pd", admission=AdmissionSettings(max_in_flight_per_engine=1))
    site["p0"].freeze()
    first = asyncio.create_task(site.ask())
    await until(lambda: site.busy("p0") == 1)
    async with await RawClient.to(site) as client:
        client.send(a_post(LONG | {"stream": is_stream}))
        await until(lambda: site.gateway.driver.scheduler.waiting_count == 1)
        client.abort()
        await until(lambda: site.gateway.driver.scheduler.waiting_count == 0)
    site["p0"].thaw()
    assert (await first).error is None


async def test_a_client_that_closes_only_its_sending_side_counts_as_gone(pair):
    async with await RawClient.to(pair) as client:
        client.send(a_post(LONG | {"stream": True}))
        await client.read_until(b"data: ")
        client.writer.write_eof()
        await pair.assert_clean()


@pytest.mark.slow
async def test_fifty_clients_that_leave_at_any_moment_leave_every_engine_idle(mesh):
    async def come_and_go(number: int) -> None:
        client = asyncio.create_task(mesh.ask(words(300, number), max_tokens=3000, stream=number % 2 == 0))
        await asyncio.wait([client], timeout=number * 0.004)
        client.cancel()
        await asyncio.wait([client])

    await asyncio.gather(*map(come_and_go, range(50)))
    await mesh.assert_clean()
    assert (await mesh.ask()).error is None


# ---- slow readers ----------------------------------------------------------------------------------------------------

PIECE = token("x" * 8000)
PIECES = 2000
"""16 MB: more than all socket buffers on the way hold."""
MOST_BYTES = 256 * 1024
"""What a reader that stops may cost the gateway."""


async def pour(received: object, writer: asyncio.StreamWriter, pieces: int = PIECES) -> None:
    writer.write(CHUNKED)
    for _ in range(pieces):
        writer.write(chunk(PIECE))
        await writer.drain()
    writer.write(chunk(DONE) + b"0\r\n\r\n")


@pytest.fixture
async def fountain():
    async with serving(pour, model="fountain") as engine:
        yield engine


async def a_client_that_does_not_read(site: Site) -> RawClient:
    """It has small buffers, has asked for the fountain's stream and takes none of it."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, site.address)
    client = RawClient(*await asyncio.open_connection(sock=sock))
    client.writer.transport.pause_reading()
    client.send(a_post(chat_body(stream=True, model="fountain"), headers="connection: close\r\n"))
    return client


def buffered_bytes(site: Site) -> int:
    """What the gateway holds for its clients, in its own memory and in the kernel's send queues."""
    transports = [connection.transport for connection in site.gateway.server.connections]
    return sum(transport.get_write_buffer_size() + unsent_bytes(transport) for transport in transports if transport)


def unsent_bytes(transport: asyncio.Transport) -> int:
    """Bytes in the kernel that the client has not acknowledged. Source: tcp(7), SIOCOUTQ, which is TIOCOUTQ."""
    told = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, b"\0" * 4)
    return int.from_bytes(told, sys.byteorder)


async def settled(read: Callable[[], int]) -> int:
    """The value once it is above 0 and has not moved for a while."""
    seen = -1
    while seen != (now := read()) or not now:
        seen = now
        await asyncio.sleep(0.1)
    return seen


async def test_a_reader_that_stops_costs_little_while_its_engine_has_100_megabytes_to_send(start, fountain):
    fountain.script = partial(pour, pieces=100_000_000 // len(PIECE))
    site = await start("b", engines=[fountain.settings("b9")])
    await fountain.is_up(site)
    async with await a_client_that_does_not_read(site):
        assert await settled(lambda: buffered_bytes(site)) <= MOST_BYTES
        assert all(result.error is None for result in await asyncio.gather(*(site.ask() for _ in range(20))))
        assert await settled(lambda: buffered_bytes(site)) <= MOST_BYTES


@pytest.mark.slow
async def test_a_reader_that_stops_costs_bounded_memory_and_then_gets_every_byte(start, fountain: ScriptedEngine):
    site = await start("b", engines=[fountain.settings("b9")])
    await fountain.is_up(site)
    async with await a_client_that_does_not_read(site) as client:
        assert await settled(lambda: buffered_bytes(site)) <= MOST_BYTES
        assert all(result.error is None for result in await asyncio.gather(*(site.ask() for _ in range(5))))
        assert await settled(lambda: buffered_bytes(site)) <= MOST_BYTES
        client.writer.transport.resume_reading()
        raw = await client.read_all()
    body = unchunked(raw.partition(b"\r\n\r\n")[2])
    assert body == PIECE * PIECES + DONE
    assert len(events(body)) == PIECES + 1


def unchunked(raw: bytes) -> bytes:
    """The body of which these are the chunks, to the last."""
    parts, at = [], 0
    while True:
        end = raw.index(b"\r\n", at)
        size = int(raw[at:end], 16)
        if size == 0:
            assert raw[end:] == b"\r\n\r\n"
            return b"".join(parts)
        parts.append(raw[end + 2 : end + 2 + size])
        at = end + 4 + size


async def test_a_reader_that_never_reads_again_is_dropped_and_its_engine_freed(start, fountain):
    hasty = ServerSettings(port=0, shutdown_grace_s=0.5, write_timeout_s=0.2)
    site = await start("", engines=[fountain.settings("b9")], is_awaited=False, server=hasty)
    await fountain.is_up(site)
    async with await a_client_that_does_not_read(site):
        await until(lambda: fountain.connections == 1)
        await until(lambda: fountain.closed == 1)
        await site.assert_clean()


async def test_a_reader_that_never_reads_its_whole_answer_is_dropped_and_the_answer_with_it(start):
    async with serving(says(whole(text_answer("x" * 8_000_000))), model="fountain") as engine:
        hasty = ServerSettings(port=0, shutdown_grace_s=0.5, write_timeout_s=0.3)
        site = await start("", engines=[engine.settings("b9")], is_awaited=False, server=hasty)
        await engine.is_up(site)
        async with await a_client_that_does_not_read(site):
            assert await settled(lambda: buffered_bytes(site)) > 1_000_000  # it is whole before it is known to be sound
            await until(lambda: buffered_bytes(site) == 0)
            await until(lambda: site.gateway.server.open_count == 0)
