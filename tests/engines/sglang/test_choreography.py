"""What the SGLang adapter relies on, asked of real engines without a gateway, so that a change is caught."""

from __future__ import annotations

import asyncio
import json
import random
import time

import aiohttp
import pytest

from adapters.endings import REQUEST_AT_FAULT
from adapters.sglang.pair import SIBLING_FAILED
from loadtest.sglang_process import SglangEngine, SglangFleet
from tests.engines.conftest import until
from tests.engines.prompts import Answer, Prompt, ask, make_prompts, wrong_answers
from tests.engines.sglang.conftest import PROMPTS, load_of
from tests.engines.sglang.record import BAD

pytestmark = [pytest.mark.engines, pytest.mark.asyncio(loop_scope="session")]

ABORTED_S = 1.0
"""Within this time after `/abort_request` nothing is left of a request: a step, and the age of the load's snapshot."""
LEFT_S = 8.0
"""Within this after its connection closed: the engine looks every 4 s."""


def room_at(prefill: SglangEngine) -> dict[str, object]:
    """Fields of a hand-off from that engine, in a room that nobody was in."""
    port, room = prefill.bootstrap_port, random.getrandbits(63)
    return {"bootstrap_host": "127.0.0.1", "bootstrap_port": port, "bootstrap_room": room, "rid": f"{room:016x}"}


def long_prompt(seed: int) -> Prompt:
    """A streamed completion of 4,000 tokens that keeps a decode engine busy for some seconds."""
    prompt = make_prompts(seed, lengths_tokens=[4000])[-1]
    return Prompt(f"long-{seed}", prompt.path, prompt.body | {"max_tokens": 600, "ignore_eos": True}, True)


async def post(session: aiohttp.ClientSession, engine: SglangEngine, path: str, body: object) -> tuple[int, bytes]:
    """Status and body of an answer."""
    async with session.post(engine.url + path, json=body) as response:
        return response.status, await response.read()


async def becomes_idle(session: aiohttp.ClientSession, engine: SglangEngine, within_s: float) -> bool:
    """Whether nothing is left of any request within that time."""

    async def is_idle() -> bool:
        return (await load_of(session, engine)).is_idle

    return await until(is_idle, within_s)


async def is_waiting(session: aiohttp.ClientSession, engine: SglangEngine) -> bool:
    """Whether a request waits there."""
    return (await load_of(session, engine)).waiting_count > 0


async def test_every_reference_differs_so_that_a_lost_prefix_would_show(references: dict[str, Answer]) -> None:
    texts = [answer.text for answer in references.values()]
    assert len(set(texts)) == len(texts)


async def test_the_forty_prompts_span_one_to_five_thousand_tokens(references: dict[str, Answer]) -> None:
    lengths = [references[prompt.name].prompt_tokens for prompt in PROMPTS]
    assert len(lengths) == 40
    assert min(lengths) == 1
    assert 4900 < max(lengths) <= 5000


async def test_both_legs_at_once_answer_as_a_single_engine_whatever_the_pair(
    sglang: SglangFleet, session: aiohttp.ClientSession, references: dict[str, Answer]
) -> None:
    answers = {}
    for prompt, (p, d) in zip(PROMPTS[20:24], [("p0", "d0"), ("p0", "d1"), ("p1", "d0"), ("p1", "d1")], strict=True):
        room = room_at(sglang[p])
        body = {name: value for name, value in prompt.body.items() if name != "stream_options"} | room
        (status, told), answers[prompt.name] = await asyncio.gather(
            post(session, sglang[p], prompt.path, body | {"stream": False}),
            ask(session, sglang[d].url, prompt, **room),
        )
        assert (status, json.loads(told)["usage"]["completion_tokens"]) == (200, 1)
    assert wrong_answers(answers, references) == []


@pytest.mark.parametrize("name", ["p0", "d0"])
@pytest.mark.parametrize("how", ["abort_request", "closed connection"])
async def test_a_leg_without_its_sibling_waits_until_it_is_told_to_stop(
    name: str, how: str, sglang: SglangFleet, session: aiohttp.ClientSession
) -> None:
    engine, body = sglang[name], make_prompts(41, [300])[0].body | room_at(sglang["p0"])
    leg = asyncio.create_task(post(session, engine, "/v1/chat/completions", body))
    assert await until(lambda: is_waiting(session, engine), 10)
    if how == "abort_request":
        assert (await post(session, engine, "/abort_request", {"rid": body["rid"]}))[0] == 200
        status, said = await leg
        assert status == 500
        assert any(text in said for texts in SIBLING_FAILED.values() for text in texts)
        assert await becomes_idle(session, engine, ABORTED_S)
    else:
        leg.cancel()
        began_at = time.monotonic()
        assert await becomes_idle(session, engine, LEFT_S)
        assert time.monotonic() - began_at > 0.5  # else aborting would be of no use


async def test_a_decode_engine_is_not_told_that_its_prefill_was_aborted(
    sglang: SglangFleet, session: aiohttp.ClientSession
) -> None:
    prompt, room = long_prompt(42), room_at(sglang["p0"])
    body = prompt.body | room
    legs = [asyncio.create_task(post(session, sglang[name], prompt.path, body)) for name in ("p0", "d0")]
    assert await until(lambda: is_waiting(session, sglang["d0"]), 10)
    await post(session, sglang["p0"], "/abort_request", {"rid": room["rid"]})
    assert (await asyncio.wait([legs[0]], timeout=10))[0]
    assert not (await asyncio.wait([legs[1]], timeout=3))[0]
    await post(session, sglang["d0"], "/abort_request", {"rid": room["rid"]})
    await legs[1]
    assert await becomes_idle(session, sglang["d0"], ABORTED_S)


@pytest.mark.parametrize("recorded", BAD, ids=lambda recorded: recorded.file)
async def test_what_any_engine_would_refuse_is_answered_with_a_status_of_the_client_s_fault(
    recorded, sglang: SglangFleet, session: aiohttp.ClientSession
) -> None:
    if recorded.file == "error_rid_list.json":
        pytest.skip("it is answered with 500, and never sent: the gateway's own ids are texts")
    if recorded.body is None:
        async with session.get(sglang[recorded.engine].url + recorded.path) as response:
            status = response.status
    else:
        status, _ = await post(session, sglang[recorded.engine], recorded.path, recorded.body)
    assert status in REQUEST_AT_FAULT
