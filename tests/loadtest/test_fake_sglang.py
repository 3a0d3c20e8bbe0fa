"""Emulated SGLang engines spoken to without a gateway: the rooms, and what each leg does when the other fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from gateway.core.types import Role
from loadtest.engine_types import EngineSettings
from loadtest.fake_engine import FakeCluster, FakeEngine, FakeSettings
from tests.polling import until

CHAT, ABORT = "/v1/chat/completions", "/abort_request"
SPEED = 20.0


class Site:
    """A prefill, a decode and a single engine."""

    def __init__(self, cluster: FakeCluster, session: aiohttp.ClientSession, engines: list[FakeEngine]) -> None:
        self.cluster, self.session = cluster, session
        self.p, self.d, self.s = engines

    async def post(self, fake: FakeEngine, path: str = CHAT, **fields: Any) -> tuple[int, Any]:
        """Status and text or JSON of the answer."""
        async with self.session.post(fake.url + path, json=fields) as response:
            is_json = response.content_type == "application/json"
            return response.status, await response.json() if is_json else await response.text()

    def leg(self, fake: FakeEngine, rid: str = "r", room: int = 5, **fields: Any) -> asyncio.Task[tuple[int, Any]]:
        """A leg under way."""
        where = {"bootstrap_host": "127.0.0.1", "bootstrap_port": self.p.bootstrap_port, "bootstrap_room": room}
        return asyncio.create_task(self.post(fake, **(a_chat() | where | {"rid": rid} | fields)))

    async def busy(self, fake: FakeEngine) -> int:
        """Requests of any kind at that engine."""
        async with self.session.get(f"{fake.url}/v1/loads") as response:
            (load,) = (await response.json())["loads"]
        return load["num_running_reqs"] + load["num_waiting_reqs"] + load["num_used_tokens"]


def a_chat(words: int = 50, **fields: Any) -> dict[str, Any]:
    """A chat at temperature 0."""
    messages = [{"role": "user", "content": "oak elm " * words}]
    return {"messages": messages, "temperature": 0, "ignore_eos": True, "max_tokens": 8} | fields


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with FakeCluster(speed=SPEED) as cluster, aiohttp.ClientSession() as session:
        roles = (Role.PREFILL, Role.DECODE, Role.BOTH)
        engines = [
            await cluster.start(FakeSettings(engine=EngineSettings(role=role), speaks="sglang")) for role in roles
        ]
        yield Site(cluster, session, engines)


async def waits(site: Site, fake: FakeEngine) -> None:
    """Returns when a request waits there for the other engine."""
    await until(lambda: fake.legs.waiting.count > 0)


@pytest.mark.parametrize("first", ["p", "d"])
async def test_the_legs_may_come_in_any_order_and_give_the_answer_of_a_single_engine(site, first):
    legs = {}
    for name in (first, {"p": "d", "d": "p"}[first]):
        legs[name] = site.leg(getattr(site, name))
        if name == first:
            await waits(site, getattr(site, name))
    (p_status, p_body), (d_status, d_body) = await legs["p"], await legs["d"]
    assert (p_status, d_status) == (200, 200)
    assert p_body["usage"]["completion_tokens"] == 1
    _, alone = await site.post(site.s, **a_chat())
    assert d_body["choices"][0]["message"] == alone["choices"][0]["message"]
    assert site.d.engine.counters.fetched_prompt_tokens > 0


@pytest.mark.parametrize(("name", "text"), [("p", "Prefill bootstrap failed"), ("d", "Decode transfer failed")])
async def test_a_lone_leg_waits_until_it_is_aborted(site, name, text):
    fake = getattr(site, name)
    leg = site.leg(fake)
    await waits(site, fake)
    await site.post(fake, ABORT, rid="r")
    status, body = await leg
    assert (status, body["code"]) == (500, 500)
    assert body["message"].startswith(text)
    assert await site.busy(fake) == 0


@pytest.mark.parametrize(("name", "text"), [("p", "Prefill bootstrap failed"), ("d", "Decode transfer failed")])
async def test_a_lone_leg_gives_up_after_300_s_of_its_own(name, text):
    async with FakeCluster(speed=1000.0) as cluster, aiohttp.ClientSession() as session:
        roles = (Role.PREFILL, Role.DECODE, Role.BOTH)
        engines = [
            await cluster.start(FakeSettings(engine=EngineSettings(role=role), speaks="sglang")) for role in roles
        ]
        site = Site(cluster, session, engines)
        status, body = await site.leg(getattr(site, name))
    assert status == 500
    assert text in body["message"]
    assert "timed out" in body["message"]


async def test_a_decode_leg_is_not_told_that_its_prefill_was_aborted(site):
    decode, prefill = site.leg(site.d), site.leg(site.p, stream=True, messages=a_chat(10_000)["messages"])
    await until(lambda: site.p.engine.load().running_count > 0)
    await site.post(site.p, ABORT, rid="r")
    await prefill
    assert not (await asyncio.wait([decode], timeout=20 / SPEED))[0]
    await site.post(site.d, ABORT, rid="r")
    assert (await decode)[0] == 500


async def test_a_prefill_leg_whose_decode_gave_up_fails_when_it_would_hand_over(site):
    long = a_chat(10_000)["messages"]
    prefill, decode = site.leg(site.p, messages=long), site.leg(site.d, messages=long)
    await until(lambda: site.p.engine.load().running_count > 0)
    await site.post(site.d, ABORT, rid="r")
    await decode
    status, body = await prefill
    assert status == 500
    assert "Failed due to an unknown reason from another rank" in body["message"]
    assert await site.busy(site.p) == 0


async def test_a_handshake_fails_after_14_s_where_no_bootstrap_server_is(site):
    status, body = await site.leg(site.d, bootstrap_port=9)
    assert status == 500
    assert body["message"].startswith("Decode handshake failed")


async def test_a_decode_leg_hears_late_that_its_prefill_engine_died(site):
    decode = site.leg(site.d)
    await waits(site, site.d)
    await site.p.die()
    status, body = await decode
    assert status == 500
    assert "Lost connection with prefill instance" in body["message"]


async def test_a_closed_connection_is_noticed_late(site):
    leg = site.leg(site.p)
    await waits(site, site.p)
    leg.cancel()
    await asyncio.wait([leg])
    assert await site.busy(site.p) > 0
    await until(lambda: site.p.legs.waiting.count == 0)


async def test_a_leg_without_a_room_or_with_an_id_in_use_is_refused(site):
    status, body = await site.post(site.d, **a_chat())
    assert (status, "bootstrap room" in body["message"]) == (400, True)
    leg = site.leg(site.d)
    await waits(site, site.d)
    assert (await site.leg(site.d, room=6))[1]["message"] == "Duplicate request ID detected: r"
    await site.post(site.d, ABORT, rid="r")
    await leg


async def test_an_abort_takes_every_id_that_begins_with_it(site):
    legs = [site.leg(site.p, rid=rid, room=room) for room, rid in enumerate(("abc", "abd"))]
    await until(lambda: site.p.legs.waiting.count == 2)
    await site.post(site.p, ABORT, rid="")
    assert site.p.legs.waiting.count == 2
    await site.post(site.p, ABORT, rid="ab")
    assert [status for status, _ in await asyncio.gather(*legs)] == [500, 500]


async def test_a_failure_before_the_first_token_of_a_stream_comes_under_200(site):
    leg = site.leg(site.d, stream=True)
    await waits(site, site.d)
    await site.post(site.d, ABORT, rid="r")
    status, text = await leg
    assert status == 200
    assert text.startswith('data: {"error":')
    assert text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("fields", [{"bootstrap_host": ["a"], "bootstrap_room": 1}, {"input_ids": [-5]}], ids=str)
async def test_a_list_for_one_value_or_a_negative_token_ends_the_server(site, fields):
    with pytest.raises(aiohttp.ClientError):
        await site.post(site.d, **(a_chat() | fields))
    assert site.d.engine.is_crashed
