from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp
import pytest
from aiohttp import web

from gateway.body import read_body
from gateway.core.errors import BadRequest, BodyTooLarge, GatewayError, RequestTimeout
from tests.integration.harness import RawClient

LIMIT_BYTES = 1000
Heard = list[bytes | GatewayError]


@pytest.fixture
async def serve() -> AsyncIterator[Callable[..., Awaitable[tuple[str, Heard]]]]:
    """A server that reads bodies and writes down what it got: `url, heard = await serve()`."""
    runners: list[web.ServerRunner] = []

    async def start(timeout_s: float = 5.0) -> tuple[str, Heard]:
        heard: Heard = []

        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            try:
                heard.append(await read_body(request, LIMIT_BYTES, timeout_s))
            except GatewayError as error:
                heard.append(error)
            return web.Response(text="read")

        runner = web.ServerRunner(web.Server(handle, lingering_time=0.01))
        await runner.setup()
        runners.append(runner)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}", heard

    yield start
    for runner in runners:
        await runner.cleanup()


async def send(url: str, head: bytes, *parts: bytes) -> bytes:
    """What comes back for a POST of these bytes, each part sent by itself."""
    port = int(url.rpartition(":")[2])
    async with RawClient(*await asyncio.open_connection("127.0.0.1", port)) as client:
        client.send(b"POST / HTTP/1.1\r\nhost: g\r\nconnection: close\r\n" + head + b"\r\n")
        for part in parts:
            await asyncio.sleep(0.01)
            client.send(part)
        return await client.read_all()


@pytest.mark.parametrize("body", [b"", b"x", b"x" * LIMIT_BYTES], ids=["empty", "one", "limit"])
async def test_a_body_within_the_limit_is_read_whole(serve, body):
    url, heard = await serve()
    async with aiohttp.ClientSession() as session, session.post(url, data=body):
        assert heard == [body]


async def test_a_body_in_pieces_is_put_together(serve):
    url, heard = await serve()
    await send(url, b"content-length: 6\r\n", b"ab", b"cd", b"ef")
    await send(url, b"transfer-encoding: chunked\r\n", b"2\r\nab\r\n", b"1\r\nc\r\n", b"0\r\n\r\n")
    assert heard == [b"abcdef", b"abc"]


async def test_an_announced_size_over_the_limit_is_refused_unread(serve):
    url, heard = await serve()
    await send(url, b"content-length: 1001\r\n")
    assert isinstance(heard[0], BodyTooLarge)
    assert "1001 bytes" in heard[0].message


async def test_a_body_of_unknown_size_is_refused_at_the_limit(serve):
    url, heard = await serve()
    await send(url, b"transfer-encoding: chunked\r\n", b"3e8\r\n" + b"x" * 1000 + b"\r\n", b"1\r\ny\r\n")
    assert isinstance(heard[0], BodyTooLarge)


async def test_a_stalled_body_is_a_time_out(serve):
    url, heard = await serve(0.1)
    await send(url, b"content-length: 3\r\n", b"x")
    assert isinstance(heard[0], RequestTimeout)
    assert "0.1 s" in heard[0].message


async def test_a_body_that_is_not_what_its_headers_say_is_a_bad_request(serve):
    url, heard = await serve()
    await send(url, b"content-length: 5\r\ncontent-encoding: gzip\r\n", b"hello")
    assert isinstance(heard[0], BadRequest)


@pytest.mark.parametrize(("version", "is_told"), [(b"1.1", True), (b"1.0", False)])
async def test_a_client_that_asks_first_is_told_to_continue_where_its_http_knows_that(serve, version, is_told):
    url, heard = await serve()
    port = int(url.rpartition(":")[2])
    async with RawClient(*await asyncio.open_connection("127.0.0.1", port)) as client:
        client.send(b"POST / HTTP/%b\r\nhost: g\r\nexpect: 100-Continue\r\ncontent-length: 1\r\n\r\n" % version)
        await asyncio.sleep(0.01)
        client.send(b"x")
        answer = await client.read_until(b"read")
    assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\n") is is_told
    assert heard == [b"x"]
