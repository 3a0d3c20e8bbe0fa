"""A field that kills a real SGLang engine: what a gateway is for. Last, for the engines do not survive it."""

from __future__ import annotations

import asyncio
import contextlib

import aiohttp
import pytest

from gateway.core.types import Role
from loadtest.engine_process import MODEL
from loadtest.sglang_process import SglangEngine, SglangFleet
from tests.engines.conftest import until
from tests.engines.prompts import Prompt, ask
from tests.engines.sglang.conftest import StartGateway

pytestmark = [pytest.mark.engines, pytest.mark.asyncio(loop_scope="session")]

CHAT = "/v1/chat/completions"
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "The gate"}], "max_tokens": 4, "temperature": 0}
HOSTILE = {"bootstrap_host": ["127.0.0.1"], "bootstrap_port": [1], "bootstrap_room": [5], "rid": ["a"]}
HOSTILE |= {"input_ids": [-5], "routed_dp_rank": 77, "disagg_prefill_dp_rank": [3], "session_params": {"id": 1}}
KILLS = {"a list of hosts": {"bootstrap_host": ["127.0.0.1"], "bootstrap_port": [1], "bootstrap_room": [5]}}


async def test_hostile_fields_do_not_reach_an_engine_through_the_gateway(
    sglang: SglangFleet, session: aiohttp.ClientSession, start_gateway: StartGateway
) -> None:
    prompt = Prompt("plain", CHAT, BODY, is_stream=False)
    async with start_gateway() as gateway:
        plain = await ask(session, gateway, prompt)
        for name, value in HOSTILE.items():
            assert await ask(session, gateway, prompt, **{name: value}) == plain, name
        assert await ask(session, gateway, prompt, **HOSTILE) == plain
        async with session.post(gateway + CHAT, json=BODY | {"lora_path": ["x"]}) as response:
            assert response.status == 400
    assert any(engine.is_running for engine in sglang)


async def test_a_token_id_beyond_the_vocabulary_ends_a_prefill_engine(
    sglang: SglangFleet, session: aiohttp.ClientSession
) -> None:
    """Why `vocabulary_tokens` stands in the settings."""
    victim, decode = sglang["p1"], next(each for each in sglang if each.is_running and each.spec.role is Role.DECODE)
    room = {
        "bootstrap_host": "127.0.0.1",
        "bootstrap_port": victim.bootstrap_port,
        "bootstrap_room": 31,
        "rid": "beyond",
    }
    body = {"model": MODEL, "prompt": [99_999], "max_tokens": 2} | room

    async def send(engine: SglangEngine) -> None:
        with contextlib.suppress(aiohttp.ClientError):
            async with session.post(f"{engine.url}/v1/completions", json=body) as response:
                await response.read()

    async def is_gone() -> bool:
        return not victim.is_running

    async with asyncio.timeout(60), asyncio.TaskGroup() as legs:
        for engine in (victim, decode):
            legs.create_task(send(engine))
    assert await until(is_gone, 30)


async def test_the_same_fields_sent_to_an_engine_end_it(sglang: SglangFleet, session: aiohttp.ClientSession) -> None:
    victim = next(engine for engine in sglang if engine.is_running)
    with pytest.raises(aiohttp.ClientError):
        await session.post(victim.url + CHAT, json=BODY | KILLS["a list of hosts"])

    async def is_gone() -> bool:
        return not victim.is_running

    assert await until(is_gone, 30)
