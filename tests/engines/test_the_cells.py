"""Cells of the fault matrix on real vLLM engines, and fields that end one: what a gateway is for.

The name puts it last: others count failed transfers since the engines began.
"""

from __future__ import annotations

import asyncio
import contextlib
import time

import aiohttp
import pytest

from loadtest.engine_process import MODEL
from loadtest.vllm_process import VllmEngine, VllmFleet
from tests.engines.conftest import until
from tests.engines.metrics import read_metrics
from tests.engines.prompts import Answer, Prompt, ask, make_prompts

pytestmark = [pytest.mark.engines, pytest.mark.asyncio(loop_scope="session")]

COMPLETIONS = "/v1/completions"
BODY = {"model": MODEL, "prompt": "The gate stood open", "max_tokens": 4, "temperature": 0}
HOSTILE: dict[str, object] = {
    "kv_transfer_params": {"do_remote_prefill": True, "remote_engine_id": "x", "remote_request_id": "y"},
    "data_parallel_rank": 77,
    "request_id": "a,b",
    "cache_salt": "",
}
DEADLY = {"do_remote_prefill": True, "do_remote_decode": False, "remote_block_ids": [], "remote_engine_id": "x"}
DEADLY |= {"remote_request_id": "y", "remote_host": "127.0.0.1", "remote_port": 9, "tp_size": 1}
IDLE_S = 5.0
FROZEN_S = 20.0
CLIENTS = 8
LEAVES = ["at once", "while it is prefilled", "with its first token", "in the middle", "before it is answered"]


def ended(name: str, ending: str, client: str, began_at: float) -> float:
    """Prints the cell; seconds since it began."""
    elapsed_s = time.monotonic() - began_at
    print(f"CELL nixl pull, real vllm | {name} | {ending} | {elapsed_s:.2f} s | {client}", flush=True)
    return elapsed_s


async def is_idle(session: aiohttp.ClientSession, engine: VllmEngine) -> bool:
    """Whether the engine has no request left."""
    metrics = await read_metrics(session, engine.url)
    return metrics.value("vllm:num_requests_running") + metrics.value("vllm:num_requests_waiting") == 0


def a_prompt(seed: int, *, max_tokens: int, is_stream: bool = True) -> Prompt:
    """3,000 tokens that no engine has cached."""
    base = next(each for each in make_prompts(seed, [3000]) if each.is_stream is is_stream)
    return Prompt(base.name, base.path, base.body | {"max_tokens": max_tokens, "ignore_eos": True}, is_stream)


async def test_hostile_fields_do_not_reach_an_engine_through_the_gateway(
    gateway: str, fleet: VllmFleet, session: aiohttp.ClientSession
) -> None:
    prompt = Prompt("plain", COMPLETIONS, BODY, is_stream=False)
    plain = await ask(session, gateway, prompt)
    for name, value in HOSTILE.items():
        async with session.post(gateway + COMPLETIONS, json=BODY | {name: value}) as response:
            told = await response.json()
        assert response.status in (200, 400), (name, told)
        assert response.status == 400 or told["choices"][0]["text"] == plain.text, name
    async with session.post(
        gateway + COMPLETIONS, json=BODY | {"kv_transfer_params": DEADLY}, headers={"x-request-id": "a,b"}
    ) as response:
        assert (await response.json())["choices"][0]["text"] == plain.text
    assert all(engine.is_running for engine in fleet)
    assert (await ask(session, gateway, prompt)).text == plain.text


async def test_the_same_parameters_sent_to_a_decode_engine_end_it(
    fleet: VllmFleet, session: aiohttp.ClientSession
) -> None:
    victim = fleet["d1"]
    began_at = time.monotonic()
    with contextlib.suppress(aiohttp.ClientError, TimeoutError):
        async with (
            asyncio.timeout(30),
            session.post(victim.url + COMPLETIONS, json=BODY | {"kv_transfer_params": DEADLY}) as response,
        ):
            assert response.status >= 500

    async def is_gone() -> bool:
        return not victim.is_running

    assert await until(is_gone, 60)
    ended("empty remote_block_ids sent directly", "the engine died", "error", began_at)


@pytest.mark.parametrize("point", LEAVES)
async def test_a_client_that_leaves_leaves_nothing_behind(
    point: str, gateway: str, fleet: VllmFleet, session: aiohttp.ClientSession
) -> None:
    prompt = a_prompt(400 + LEAVES.index(point), max_tokens=2000, is_stream=point != "before it is answered")
    events = {"with its first token": 1, "in the middle": 50}.get(point)

    async def stay() -> None:
        async with session.post(gateway + prompt.path, json=prompt.body) as response:
            count = 0
            async for line in response.content:
                count += line.startswith(b"data:")
                if count == events:
                    return

    async def is_busy(*names: str) -> bool:
        return any([not await is_idle(session, fleet[name]) for name in names])

    client = asyncio.create_task(stay())
    if events is not None:
        await client
    elif point == "at once":
        await asyncio.sleep(0.02)
    else:
        names = ("d0", "d1") if point == "before it is answered" else ("p0", "p1")
        assert await until(lambda: is_busy(*names), 30)
    assert events is not None or not client.done()
    began_at = time.monotonic()
    client.cancel()
    await asyncio.wait([client])

    async def is_over() -> bool:
        return not await is_busy("p0", "p1", "d0", "d1")

    assert await until(is_over, IDLE_S)
    ended(f"client leaves {point}", "both legs hung up", "left", began_at)


async def test_a_prefill_engine_killed_at_work_costs_no_client_its_answer(
    gateway: str, fleet: VllmFleet, session: aiohttp.ClientSession
) -> None:
    prompts = [a_prompt(600 + n, max_tokens=8) for n in range(CLIENTS)]
    clients = [asyncio.create_task(ask(session, gateway, prompt)) for prompt in prompts]

    async def is_computing() -> bool:
        return not await is_idle(session, fleet["p0"])

    assert await until(is_computing, 30)
    began_at = time.monotonic()
    await fleet["p0"].kill()
    answers: list[Answer] = await asyncio.gather(*clients)
    ended("prefill dies at work", "tried anew", f"{CLIENTS} whole answers, the last after this time", began_at)
    assert any(each.headers["x-sluice-attempts"] != "1" for each in answers)
    assert answers == [await ask(session, gateway, prompt) for prompt in prompts]


async def test_a_decode_engine_that_freezes_costs_no_client_its_answer(
    gateway: str, fleet: VllmFleet, session: aiohttp.ClientSession
) -> None:
    prompts = [a_prompt(700 + n, max_tokens=8) for n in range(CLIENTS)]
    clients = [asyncio.create_task(ask(session, gateway, prompt)) for prompt in prompts]
    victim = fleet["d0"]
    victim.freeze()
    try:
        began_at = time.monotonic()
        answers: list[Answer] = await asyncio.gather(*clients)
        elapsed_s = ended("decode freezes", "tried anew", f"{CLIENTS} answers, the last after this time", began_at)
    finally:
        await victim.kill()
    assert any(each.headers["x-sluice-attempts"] != "1" for each in answers)
    assert elapsed_s < FROZEN_S
    assert answers == [await ask(session, gateway, prompt) for prompt in prompts]
