"""Each way of handing KV on, behind the gateway: the text of a single engine, and KV that really moved."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest

from gateway.core.types import Role
from loadtest.engine_types import EngineSettings as FakeEngineSettings
from loadtest.fake_engine import FakeCluster, FakeSettings
from tests.integration.harness import CHAT, Site, Start, chat_body, words
from tests.polling import until

CONNECTORS = ("nixl", "nixl_push", "mooncake", "store")
connectors = pytest.mark.parametrize("connector", CONNECTORS)


async def texts(site: Site, *, stream: bool, count: int = 8) -> list[str]:
    results = await asyncio.gather(*(site.ask(words(100, seed), max_tokens=20, stream=stream) for seed in range(count)))
    assert [result.error for result in results] == [None] * count
    return [result.text for result in results]


def moved_tokens(site: Site) -> int:
    return sum(site[name].engine.counters.external_hit_tokens for name in site.fakes if name.startswith("d"))


@connectors
@pytest.mark.parametrize("is_stream", [True, False], ids=["stream", "whole"])
async def test_eight_at_once_get_the_text_of_a_single_engine_and_their_kv_was_moved(start: Start, connector, is_stream):
    single = await start("b")
    site = await start("ppdd", fake={"connector": connector})
    assert await texts(site, stream=is_stream) == await texts(single, stream=is_stream)
    assert moved_tokens(site) > 8 * 90
    assert all(fake.engine.load().held_count == 0 for fake in site.fakes.values())


@connectors
async def test_a_text_of_one_token_is_served_too(start: Start, connector):
    site = await start("pd", fake={"connector": connector})
    result = await site.ask(words(40), max_tokens=1)
    assert (result.error, result.output_tokens) == (None, 1)


async def test_a_mooncake_engine_that_started_again_is_asked_anew_who_it_is(start: Start):
    site = await start("pd", fake={"connector": "mooncake"})
    (before,) = site.state.engines["p0"].engine.transfer_ids
    await site["p0"].die()
    await until(lambda: not site.is_up("p0"))
    await site["p0"].revive()
    await until(lambda: site.is_up("p0"))
    assert site.state.engines["p0"].engine.transfer_ids not in ((), (before,))
    assert (await site.ask("hello")).error is None


@pytest.mark.parametrize("connector", ["nixl_push", "mooncake"])
async def test_a_decode_that_waits_for_a_prefill_engine_that_died_is_given_up_when_that_is_known(
    start: Start, connector
):
    """Its own patience is 480 s."""
    site = await start("ppd", fake={"connector": connector})
    expected = (await site.ask(words(60), max_tokens=20)).text
    site["d0"].freeze()
    asking = asyncio.create_task(site.ask(words(60), max_tokens=20, stream=False))
    await until(lambda: site.busy("d0") == 1)
    await until(lambda: any(site[name].engine.load().held_count for name in ("p0", "p1")))
    holder = "p0" if site["p0"].engine.load().held_count else "p1"
    await site[holder].die()
    await until(lambda: not site.is_up(holder))
    site["d0"].thaw()
    result = await asking
    assert (result.error, result.text) == (None, expected)


HOSTILE = {
    "kv_transfer_params": {"do_remote_prefill": True, "remote_engine_id": "x"},
    "bootstrap_room": [1, 2],
    "bootstrap_host": ["a", "b"],
    "routed_dp_rank": 99,
    "data_parallel_rank": -1,
    "request_id": "a,b",
    "rid": ["a"],
    "vllm_xargs": {"kv_transfer_params": "{}", "do_remote_decode": True},
}
HEADERS = {"X-Request-Id": "a,b,c", "X-data-parallel-rank": "99", "X-Vllm-Priority": "-5"}


async def test_what_would_kill_an_engine_kills_it_when_it_comes_directly(session_of_engines):
    """The shapes of `test_hostile_fields_...`, sent past the gateway."""
    post, cluster = session_of_engines
    pull = await cluster.start(FakeSettings(engine=FakeEngineSettings(role=Role.DECODE)))
    body = chat_body(words(40)) | {"kv_transfer_params": {"do_remote_prefill": True, "remote_engine_id": "x"}}
    await asyncio.wait([asyncio.ensure_future(post(pull.url + CHAT, body))], timeout=5)
    assert pull.engine.is_crashed
    for connector, role, params in (
        ("mooncake", Role.DECODE, {"do_remote_decode": True, "transfer_id": "x"}),
        ("mooncake", Role.PREFILL, {"do_remote_prefill": True, "transfer_id": "x"}),
        ("nixl_push", Role.DECODE, {"do_remote_prefill": True, "remote_engine_id": "x"}),
    ):
        engine = FakeSettings(engine=FakeEngineSettings(role=role), connector=connector)
        victim = await cluster.start(engine)
        assert await post(victim.url + CHAT, chat_body("hi") | {"kv_transfer_params": params}) == 500
        assert victim.engine.is_crashed


@connectors
async def test_hostile_fields_and_headers_of_a_client_never_reach_an_engine(start: Start, connector):
    site = await start("pd", fake={"connector": connector})
    plain = await site.post(CHAT, chat_body(words(40)))
    for name, value in HOSTILE.items():
        status, body, _ = await site.post(CHAT, chat_body(words(40)) | {name: value}, headers=HEADERS)
        assert status == 200, name
        assert body["choices"] == plain[1]["choices"]
    assert not any(fake.engine.is_crashed for fake in site.fakes.values())


@pytest.mark.parametrize("salt", ["a,b", "x" * 129, "@", "", 7, ["s"]])
async def test_a_salt_is_the_engines_to_judge_and_hurts_none(start: Start, salt):
    site = await start("pd")
    status, _, _ = await site.post(CHAT, chat_body(words(40), cache_salt=salt))
    assert status in (200, 400)
    assert not any(fake.engine.is_crashed for fake in site.fakes.values())


@pytest.fixture
async def session_of_engines(start: Start):
    """A way to post straight to an engine (the status; None when it hung up), and a cluster to start engines in."""
    async with FakeCluster(speed=20) as cluster, aiohttp.ClientSession() as session:

        async def post(url: str, body: object) -> int | None:
            try:
                async with session.post(url, json=body) as response:
                    return response.status
            except aiohttp.ClientError:
                return None

        yield post, cluster
