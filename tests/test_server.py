from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from gateway.server import Server
from tests.integration.harness import RawClient, head_and_body
from tests.polling import until


@asynccontextmanager
async def serving(
    handle, *, grace_s: float = 0.1, **settings: float
) -> AsyncIterator[tuple[Server, web.ServerRunner, int]]:
    fields = {"max_connections": 10, "max_header_bytes": 2048, "keepalive_s": 5.0}
    server = Server(handle, **(fields | settings))
    runner = web.ServerRunner(server, shutdown_timeout=grace_s)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield server, runner, runner.addresses[0][1]
    finally:
        await runner.cleanup()


async def connect(port: int) -> RawClient:
    return RawClient(*await asyncio.open_connection("127.0.0.1", port))


async def ok(request: web.BaseRequest) -> web.StreamResponse:
    return web.Response(text="ok")


GET = b"GET / HTTP/1.1\r\nhost: g\r\n\r\n"


async def test_what_cannot_be_parsed_is_answered_in_openais_shape():
    async with serving(ok) as (_, _, port), await connect(port) as client:
        client.send(b"GET / HTTP/1.1\r\nbroken\r\n\r\n")
        status, headers, body = head_and_body(await client.read_all())
    assert (status, headers["server"]) == (400, "sluice")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


async def test_a_handler_that_fails_is_a_500_without_its_reason():
    async def fail(request):
        raise RuntimeError("secret")

    async with serving(fail) as (_, _, port), await connect(port) as client:
        client.send(GET)
        status, _, body = head_and_body(await client.read_all())
    assert status == 500
    assert b"secret" not in body


async def test_a_connection_over_the_limit_is_closed_and_a_closed_one_makes_room():
    async with serving(ok, max_connections=1) as (server, _, port):
        async with await connect(port) as first:
            first.send(GET)
            await first.read_until(b"ok")
            async with await connect(port) as second:
                assert await second.read_all() == b""
            first.send(GET)
            await first.read_until(b"ok")
        await until(lambda: server.open_count == 0)
        async with await connect(port) as third:
            third.send(GET)
            await third.read_until(b"ok")


async def test_an_idle_connection_is_closed_after_its_time():
    async with serving(ok, keepalive_s=0.05) as (_, _, port), await connect(port) as client:
        client.send(GET)
        assert (await client.read_all()).endswith(b"ok")


async def test_a_head_that_never_ends_is_closed_after_the_same_time():
    async with serving(ok, keepalive_s=0.05) as (_, _, port), await connect(port) as client:
        client.send(b"GET / HTTP/1.1\r\nhost:")
        assert await client.read_all() == b""


async def test_a_client_that_leaves_cancels_its_handler():
    ended: list[str] = []

    async def wait(request):
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    async with serving(wait) as (_, _, port):
        async with await connect(port) as client:
            client.send(GET)
            await asyncio.sleep(0.02)
        await until(lambda: ended == ["cancelled"])


@pytest.mark.parametrize("takes_s", [0.03, 30.0])
async def test_a_shutdown_waits_for_running_handlers_no_longer_than_its_grace(takes_s):
    ended: list[str] = []

    async def slow(request):
        try:
            await asyncio.sleep(takes_s)
            ended.append("served")
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            ended.append("cancelled")
            raise
        return web.Response(text="ok")

    async with serving(slow) as (_, runner, port), await connect(port) as client:
        client.send(GET)
        await asyncio.sleep(0.01)
        async with asyncio.timeout(1):
            await runner.cleanup()
        assert ended == ["served" if takes_s < 1 else "cancelled"]
        assert (await client.read_all()).endswith(b"ok" if takes_s < 1 else b"")


async def test_a_connection_that_came_in_at_the_last_moment_does_not_hold_the_shutdown_up():
    is_there, is_told = asyncio.Event(), asyncio.Event()

    async def wait(request):
        is_there.set()
        await is_told.wait()
        return web.Response(text="ok")

    async with serving(wait, grace_s=20.0) as (server, runner, port), await connect(port) as client:
        client.send(GET)
        await is_there.wait()
        stopping = asyncio.create_task(runner.cleanup())
        await asyncio.sleep(0.02)
        ours, theirs = socket.socketpair()
        await asyncio.get_running_loop().connect_accepted_socket(server, ours)
        is_told.set()
        await asyncio.wait_for(stopping, 5)
        theirs.close()
