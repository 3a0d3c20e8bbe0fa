"""Engines are told at once of requests that are over, by id, and nobody waits for their answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from adapters.base import Call, Leg
from gateway.aborts import AGAIN_AFTER_S, MAX_WAITING, SENDERS, Aborts
from gateway.core.types import Engine, Role
from gateway.tasks import beside
from tests.polling import until


class Listener:
    """An engine that hears aborts; it answers only while it is let."""

    def __init__(self) -> None:
        self.heard: list[tuple[bytes, str | None]] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.url = ""

    async def __call__(self, request: web.BaseRequest) -> web.Response:
        self.heard.append((await request.read(), request.headers.get("authorization")))
        await self.may_answer.wait()
        return web.Response(status=500)


@pytest.fixture
async def engine() -> AsyncIterator[Listener]:
    listener = Listener()
    runner = web.ServerRunner(web.Server(listener))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    listener.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield listener
    listener.may_answer.set()
    await runner.cleanup()


def a_call(url: str, body: bytes | None = b"1") -> Call:
    abort = None if body is None else ("/abort_request", body)
    return Call(Leg.DECODE, Engine("d", url, Role.DECODE), "/x", b"{}", abort=abort)


async def test_an_engine_hears_of_each_call_with_its_key_and_its_refusal_matters_to_nobody(engine):
    aborts = Aborts(lambda engine_id: f"key of {engine_id}")
    async with beside(aborts.run()):
        for body in (b"1", b"2"):
            aborts.put(a_call(engine.url, body))
        await until(lambda: len(engine.heard) == 2)
    assert sorted(engine.heard) == [(b"1", "Bearer key of d"), (b"2", "Bearer key of d")]


async def test_an_abort_is_sent_again_for_the_first_may_overtake_its_request(engine):
    aborts = Aborts(lambda engine_id: None)
    async with beside(aborts.run()):
        aborts.put(a_call(engine.url))
        await until(lambda: len(engine.heard) == 1 + len(AGAIN_AFTER_S))
        await asyncio.sleep(0.1)
    assert engine.heard == [(b"1", None)] * (1 + len(AGAIN_AFTER_S))


async def test_a_call_without_an_abort_is_nobody_s_business(engine):
    aborts = Aborts(lambda engine_id: None)
    async with beside(aborts.run()):
        aborts.put(a_call(engine.url, None))
        aborts.put(a_call(engine.url, b"2"))
        await until(lambda: bool(engine.heard))
    assert engine.heard == [(b"2", None)]


async def test_an_engine_that_is_gone_does_not_hold_up_the_others(engine):
    aborts = Aborts(lambda engine_id: None)
    async with beside(aborts.run()):
        for _ in range(3 * SENDERS):
            aborts.put(a_call("http://127.0.0.1:9"))
        aborts.put(a_call(engine.url))
        await until(lambda: bool(engine.heard))


async def test_more_than_can_wait_are_left_to_the_engines_own_notice(engine):
    aborts = Aborts(lambda engine_id: None)
    for _ in range(MAX_WAITING + 5):
        aborts.put(a_call(engine.url))
    assert aborts.left_out_count == 5
