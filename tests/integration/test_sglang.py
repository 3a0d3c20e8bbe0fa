"""SGLang's hand-offs through the gateway, on emulated engines: whatever fails, neither engine is left waiting."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest

from gateway.config import EngineClientSettings
from gateway.config import EngineSettings as ConfiguredEngine
from gateway.core.types import Health, Role
from tests.integration.harness import CHAT, Site, Start, a_chat, chat_body, events, words
from tests.polling import until

PROMPT = words(200)
LONG_PROMPT = words(6000)
QUICK_CLIENT = EngineClientSettings(connect_timeout_s=0.5, first_event_timeout_s=0.6, idle_timeout_s=0.6)
PATIENT_CLIENT = EngineClientSettings(first_event_timeout_s=20.0)
SGLANG = {"speaks": "sglang"}
both_ways = pytest.mark.parametrize("is_stream", [True, False], ids=["stream", "whole"])


@pytest.fixture
async def sglang(start: Start) -> Site:
    """Two prefill and two decode engines, and limits short enough to be met."""
    return await start("ppdd", fake=SGLANG, engine_client=QUICK_CLIENT)


@pytest.fixture
async def expected(start: Start) -> str:
    """What a single engine, asked directly, answers."""
    single = await start("b", fake=SGLANG)
    result = await single.ask(PROMPT, max_tokens=30)
    assert result.error is None
    return result.text


async def answer(site: Site, is_stream: bool, prompt: str = PROMPT):
    return await site.ask(prompt, max_tokens=30, stream=is_stream)


@both_ways
async def test_a_hand_off_gives_the_text_of_a_single_engine(sglang, expected, is_stream):
    result = await answer(sglang, is_stream)
    assert (result.error, result.text, result.output_tokens) == (None, expected, 30)
    assert result.headers["x-sluice-attempts"] == "1"
    assert sum(fake.engine.counters.transferred_bytes > 0 for fake in sglang.fakes.values()) == 1


async def test_engines_tell_their_pages_capacity_and_ports_and_that_they_cannot_serve_alone(sglang):
    engines = {name: state.engine for name, state in sglang.state.engines.items()}
    fake = sglang["p1"]
    assert engines["p1"].details["disaggregation_bootstrap_port"] == fake.bootstrap_port
    assert engines["p1"].block_tokens == fake.engine.settings.block_tokens
    assert not any(engine.can_serve_alone for engine in engines.values())


async def test_an_engine_started_as_something_else_than_configured_stays_down_and_says_why(start):
    site = await start("pd", fake=SGLANG)
    wrong = ConfiguredEngine(url=site["p0"].url, role=Role.DECODE, id="wrong", adapter="sglang")
    other = await start("pd", fake=SGLANG, engines=[wrong])
    await until(lambda: other.state.engines["wrong"].health is Health.DOWN)
    assert "started as prefill" in other.state.engines["wrong"].health_reason


async def test_a_request_that_cannot_be_handed_off_is_refused_where_no_engine_does_both(sglang):
    status, body, _ = await sglang.post(CHAT, chat_body(PROMPT, n=2))
    assert (status, body["error"]["code"]) == (503, "no_prefill")


async def test_a_single_engine_serves_what_cannot_be_handed_off_beside_a_pool(start):
    site = await start("pdb", fake=SGLANG)
    assert (await site.ask(PROMPT)).error is None


# ---- one leg fails ---------------------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("victim", ["p0", "d0"])
async def test_an_engine_that_refuses_connections_is_avoided(sglang, expected, is_stream, victim):
    sglang[victim].refuse_connections()
    results = [await answer(sglang, is_stream) for _ in range(3)]
    assert [result.text for result in results] == [expected] * 3


@both_ways
@pytest.mark.parametrize("victim", ["p0", "d0"])
async def test_an_engine_that_fails_with_500_costs_one_attempt(sglang, expected, is_stream, victim):
    sglang[victim].faults.errors_left = 1
    results = [await answer(sglang, is_stream) for _ in range(3)]
    assert [result.text for result in results] == [expected] * 3
    assert sglang[victim].faults.errors_left == 0


@both_ways
@pytest.mark.parametrize("victim", ["p0", "d0"])
@pytest.mark.parametrize("how", ["silent", "frozen"])
async def test_an_engine_that_does_nothing_is_left_after_our_own_limit(start, expected, is_stream, victim, how):
    site = await start("ppdd", fake=SGLANG, engine_client=QUICK_CLIENT)
    if how == "silent":
        site[victim].faults.is_silent = True
    else:
        site[victim].freeze()
    results = [await answer(site, is_stream) for _ in range(2)]
    assert [result.text for result in results] == [expected] * 2
    site[victim].faults.is_silent = False


@both_ways
@pytest.mark.parametrize("victim", ["p0", "d0"])
async def test_an_engine_that_dies_before_the_first_token_costs_no_client_its_answer(start, is_stream, victim):
    site = await start("ppdd", fake=SGLANG, engine_client=PATIENT_CLIENT)
    reference = (await answer(site, is_stream, LONG_PROMPT)).text
    site[victim].freeze()
    asked = asyncio.create_task(answer(site, is_stream, LONG_PROMPT + " " + words(3, seed=1)))
    others = asyncio.create_task(answer(site, is_stream, LONG_PROMPT))
    await until(lambda: site.busy() > 0)
    await site[victim].die()
    assert (await asked).error is None
    assert (await others).text == reference


async def test_a_hand_off_to_a_wrong_address_is_left_after_our_own_limit(start, expected):
    """On an engine's own clock the handshake would fail after 14 s."""
    site = await start("pd", fake=SGLANG, engine_client=QUICK_CLIENT, speed=1.0)
    lost = site["p0"].bootstrap_port
    rooms = site.cluster.rooms.pop(lost)
    result = await answer(site, True)
    assert result.status == 504
    site.cluster.rooms[lost] = rooms
    assert (await answer(site, True)).text == expected


async def test_a_failed_handshake_is_tried_on_another_prefill_engine(start, expected):
    """The decode engine says so after 14 s of its own clock, here 0.7 s."""
    site = await start("ppd", fake=SGLANG, engine_client=PATIENT_CLIENT)
    del site.cluster.rooms[site["p0"].bootstrap_port]
    results = [await answer(site, True) for _ in range(2)]
    assert [result.text for result in results] == [expected] * 2
    assert {result.headers["x-sluice-prefill"] for result in results} == {"p1"}


async def test_what_any_engine_would_refuse_is_answered_in_openai_s_shape_and_frees_both_legs(sglang):
    status, body, _ = await sglang.post(CHAT, chat_body(PROMPT, max_tokens=10**6))
    assert status == 400
    assert body["error"]["message"].startswith("max_completion_tokens is too large")
    assert body["error"]["type"] == "BadRequestError"
    await until(sglang.is_idle)


async def test_a_decode_engine_that_dies_in_mid_stream_ends_it_with_one_error_event(start):
    site = await start("pd", fake=SGLANG, speed=2.0)
    async with site.session.post(site.url + CHAT, json=chat_body(PROMPT, stream=True, max_tokens=2000)) as response:
        text = await response.content.readuntil(b"\n\n")
        await site["d0"].die()
        text += await response.content.read()
    *_, last = events(text)
    assert '"error"' in last
    await site["d0"].revive()


# ---- the client leaves -----------------------------------------------------------------------------------------------


LOOK_S = 3.0
"""Less than the 4 s after which an engine looks by itself whether its client is there."""


async def is_idle_soon(site: Site) -> bool:
    """Whether the engines were free before they looked themselves."""
    began_at = asyncio.get_running_loop().time()
    await until(lambda: site.busy() == 0)
    return asyncio.get_running_loop().time() - began_at < LOOK_S


@pytest.mark.parametrize("busy", ["p0", "d0"])
@both_ways
async def test_a_client_that_leaves_before_the_first_token_frees_both_engines_at_once(start, busy, is_stream):
    site = await start("pd", fake=SGLANG, speed=1.0)
    asked = asyncio.create_task(site.client.send(a_chat(LONG_PROMPT, stream=is_stream, max_tokens=2000)))
    await until(lambda: site.busy(busy) > 0)
    asked.cancel()
    assert await is_idle_soon(site)


@pytest.mark.parametrize("seen_events", [1, 20])
async def test_a_client_that_leaves_in_mid_stream_frees_its_decode_engine_at_once(start, seen_events):
    site = await start("pd", fake=SGLANG, speed=1.0)
    async with site.session.post(site.url + CHAT, json=chat_body(PROMPT, stream=True, max_tokens=2000)) as response:
        for _ in range(seen_events):
            await response.content.readuntil(b"\n\n")
        assert site.busy("d0") > 0
        response.close()
    assert await is_idle_soon(site)


async def test_an_engine_that_does_not_take_aborts_frees_its_memory_when_it_looks_itself(start):
    site = await start("pd", fake=SGLANG, speed=10.0)
    site["d0"].legs.abort = lambda rid: None  # type: ignore[method-assign]
    asked = asyncio.create_task(site.client.send(a_chat(LONG_PROMPT, max_tokens=20_000)))
    await until(lambda: site.busy("d0") > 0)
    asked.cancel()
    await until(lambda: site.busy() == 0)


async def test_hostile_fields_never_reach_an_engine_that_would_die_of_them(sglang, expected):
    hostile = {"bootstrap_host": ["a"], "bootstrap_port": [1], "bootstrap_room": [1], "rid": ["a"], "input_ids": [-5]}
    for fields in ({name: value} for name, value in hostile.items()):
        result = await sglang.ask(PROMPT, max_tokens=30, **fields)
        assert (result.error, result.text) == (None, expected)
    assert not any(fake.engine.is_crashed for fake in sglang.fakes.values())


@pytest.mark.parametrize("fields", [{"bootstrap_host": ["a"], "bootstrap_room": 1}, {"input_ids": [-5]}], ids=str)
async def test_and_die_of_them_it_would(start, fields):
    site = await start("pd", fake=SGLANG)
    with pytest.raises(aiohttp.ClientError):
        await site.session.post(site["d0"].url + CHAT, json=chat_body(**fields))
    assert site["d0"].engine.is_crashed
