"""The gateway in front of real SGLang engines: a single engine's answers, whatever is killed, frozen or hung up.

In this order the engines die: each test works with those that are left, for a start takes half a minute.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import aiohttp
import pytest

from loadtest.sglang_process import SglangEngine, SglangFleet
from tests.engines.conftest import until
from tests.engines.metrics import Metrics
from tests.engines.prompts import Answer, AskFailed, Prompt, ask, make_prompts, wrong_answers
from tests.engines.sglang.conftest import FRESH_PROMPTS, PROMPTS, Cell, StartGateway, key_of, load_of

pytestmark = [pytest.mark.engines, pytest.mark.asyncio(loop_scope="session")]

AT_ONCE = 8
KV_TOKEN_BYTES = 2 * 3 * 2 * 64 * 4
"""Keys and values, layers, heads, head size and bytes of a number of the tiny model."""
LIMIT_S = 8.0
"""For a first event: enough for these prompts on a busy machine, less than the 14 s of a failed handshake."""
TRIALS = 8
IDLE_S = 3.0
"""Within this after its client left, nothing is left of a request on any engine."""
FROZEN_S = 15.0
"""Three probes without an answer, 2 s each, and the second attempt."""
SENT_BYTES = 3000
"""More than the probes that wait at a frozen engine; less than one request of 1,000 tokens."""


async def ask_all(
    session: aiohttp.ClientSession, url: str, prompts: Iterable[Prompt], at_once: int
) -> dict[str, Answer]:
    """The answers by what their references are found under, with so many under way at once."""
    slots = asyncio.Semaphore(at_once)

    async def ask_one(prompt: Prompt) -> tuple[str, Answer]:
        async with slots:
            return key_of(prompt), await ask(session, url, prompt)

    return dict(await asyncio.gather(*(ask_one(prompt) for prompt in prompts)))


async def moved_bytes(session: aiohttp.ClientSession, sglang: SglangFleet) -> float:
    """KV bytes that the prefill engines say they have sent."""
    total = 0.0
    for name in ("p0", "p1"):
        async with session.get(f"{sglang[name].url}/metrics/") as response:
            metrics = Metrics(await response.text())
        try:
            total += metrics.value("sglang:kv_transfer_total_mb_sum") * 2**20
        except KeyError:  # none so far
            continue
    return total


async def idle_within(session: aiohttp.ClientSession, engines: Iterable[SglangEngine], within_s: float) -> bool:
    """Whether nothing is left of any request on these engines within that time."""

    async def are_idle() -> bool:
        return all([(await load_of(session, engine)).is_idle for engine in engines])

    return await until(are_idle, within_s)


def running(sglang: SglangFleet) -> list[SglangEngine]:
    """The engines that have not been killed."""
    return [engine for engine in sglang if engine.is_running]


async def test_forty_answers_equal_those_of_a_single_engine_and_their_kv_was_moved(
    sglang: SglangFleet, session: aiohttp.ClientSession, references: dict[str, Answer], start_gateway: StartGateway
) -> None:
    before = await moved_bytes(session, sglang)
    async with start_gateway() as gateway:
        answers = await ask_all(session, gateway, PROMPTS, AT_ONCE)
    assert wrong_answers(answers, references) == []
    assert len(answers) == 40
    pairs = {(answer.headers["x-sluice-prefill"], answer.headers["x-sluice-decode"]) for answer in answers.values()}
    assert len({prefill for prefill, _ in pairs}) == len({decode for _, decode in pairs}) == 2
    needed = KV_TOKEN_BYTES * sum(answer.prompt_tokens for answer in answers.values())
    moved = await moved_bytes(session, sglang) - before
    print(f"KV sglang | {needed} bytes of prompts | {moved:.0f} bytes moved")
    # Every prompt whole, in pages of 16 tokens, and none of them twice.
    assert needed * 0.99 <= moved <= needed + 40 * 16 * KV_TOKEN_BYTES


async def test_a_prompt_asked_again_is_found_where_it_is_cached(
    sglang: SglangFleet, session: aiohttp.ClientSession, start_gateway: StartGateway
) -> None:
    prompt = make_prompts(61, [2000])[1]
    async with start_gateway() as gateway:
        first = await ask(session, gateway, prompt)

        async def is_known() -> bool:
            again = await ask(session, gateway, prompt)
            is_there = again.headers["x-sluice-prefill"] == first.headers["x-sluice-prefill"]
            return is_there and int(again.headers["x-sluice-cached-tokens"]) > 1900

        assert await until(is_known, 10)


LEAVES = ["at once", "while it is prefilled", "with its first token", "in the middle", "before it is answered"]


@pytest.mark.parametrize("point", LEAVES)
async def test_a_client_that_leaves_frees_both_engines(
    point: str, sglang: SglangFleet, session: aiohttp.ClientSession, start_gateway: StartGateway
) -> None:
    async with start_gateway() as gateway:
        await leave(session, gateway, point, sglang)
        cell = Cell(f"client leaves {point}")
        assert await idle_within(session, running(sglang), IDLE_S), [await load_of(session, each) for each in sglang]
        assert cell.ended("both legs hung up and aborted", "gone") < IDLE_S + 1


async def leave(session: aiohttp.ClientSession, url: str, point: str, sglang: SglangFleet) -> None:
    """Asks, and closes the connection at that point; asks anew when the point was over before it was seen."""
    for attempt in range(TRIALS):
        client = asyncio.create_task(stay(session, url, long_prompt(point, attempt), point))
        is_seen = await is_at(session, url, point, sglang, client)
        client.cancel()
        await asyncio.wait([client])
        if is_seen:
            return
    pytest.fail(f"in {TRIALS} trials no request was seen {point}")


def long_prompt(point: str, attempt: int) -> Prompt:
    """4,000 tokens that no engine has cached, answered with 2,000."""
    is_stream = point != "before it is answered"
    base = make_prompts(70 + LEAVES.index(point) + 100 * attempt, [4000])[3 if is_stream else 2]
    return Prompt(point, base.path, base.body | {"max_tokens": 2000, "ignore_eos": True}, is_stream)


async def stay(session: aiohttp.ClientSession, url: str, prompt: Prompt, point: str) -> None:
    """Reads the answer up to the point where it shows the point, else to its end."""
    async with session.post(url + prompt.path, json=prompt.body) as response:
        events = 0
        async for line in response.content:
            events += line.startswith(b"data:")
            if events == {"with its first token": 1, "in the middle": 50, "while it is prefilled": 1}.get(point):
                return


async def is_at(
    session: aiohttp.ClientSession, url: str, point: str, sglang: SglangFleet, client: asyncio.Task[None]
) -> bool:
    """Whether that point was reached, as soon as it is; False when the client had its first token before."""

    async def is_decoding() -> bool:
        return any([(await load_of(session, sglang[name])).running_count for name in ("d0", "d1")])

    if point == "at once":
        return await until(lambda: is_sent(session, url), 10)
    if point == "before it is answered":
        return await until(is_decoding, 20)
    if point != "while it is prefilled":
        await client
        return True
    while not client.done():  # what an engine tells is a third of a second old, and so may its prefill be over
        if any([(await load_of(session, sglang[name])).used_tokens for name in ("p0", "p1")]):
            return not client.done()
        await asyncio.sleep(0.02)
    return False


async def is_sent(session: aiohttp.ClientSession, url: str) -> bool:
    """Whether the gateway has sent something to an engine."""
    async with session.get(f"{url}/ready") as response:
        return any(engine["in_flight"] for engine in (await response.json())["engines"])


async def test_a_hand_off_that_never_comes_about_is_tried_on_another_pair_within_our_own_limit(
    session: aiohttp.ClientSession, start_gateway: StartGateway
) -> None:
    """p1's bootstrap server is looked for where nobody listens; SGLang itself would give up after 14 s, or 300.

    Of four long prompts at once, which nobody has cached, some go to p1.
    """
    limits = f"[engine_client]\nfirst_event_timeout_s = {LIMIT_S}\n"
    prompts = make_prompts(90, [2000])
    async with start_gateway("p1", "p0", "d0", more=limits, p1={"bootstrap_port": 9}) as gateway:

        async def timed(prompt: Prompt) -> Answer:
            cell = Cell("hand-off times out")
            answer = await ask(session, gateway, prompt)
            attempts = answer.headers["x-sluice-attempts"]
            assert cell.ended(f"tried anew, {attempts} attempts", "whole answer") < LIMIT_S + 5.0
            return answer

        answers = await asyncio.gather(*map(timed, prompts))
    assert "2" in [answer.headers["x-sluice-attempts"] for answer in answers]
    async with start_gateway("p0", "d0") as gateway:
        assert answers == [await ask(session, gateway, prompt) for prompt in prompts]


async def test_a_decode_engine_killed_in_the_middle_of_its_stream_ends_it_with_one_error_event(
    sglang: SglangFleet, session: aiohttp.ClientSession, start_gateway: StartGateway
) -> None:
    base = make_prompts(80, [1000])[3]
    prompt = Prompt("long", base.path, base.body | {"max_tokens": 3000, "ignore_eos": True}, is_stream=True)
    async with start_gateway("p0", "p1", "d1") as gateway:
        client = asyncio.create_task(ask(session, gateway, prompt))

        async def is_decoding() -> bool:
            return (await load_of(session, sglang["d1"])).used_tokens > 1100

        assert await until(is_decoding, 30)
        cell = Cell("decode dies in mid-stream")
        await sglang["d1"].kill()
        with pytest.raises(AskFailed, match=r"broke|ended early"):
            await client
        assert cell.ended("its stream ends", "one error event") < 5
    assert await idle_within(session, [sglang["p0"], sglang["p1"]], IDLE_S)


async def test_a_prefill_engine_killed_under_load_costs_no_client_its_answer(
    sglang: SglangFleet, session: aiohttp.ClientSession, references: dict[str, Answer], start_gateway: StartGateway
) -> None:
    victim = sglang["p0"]

    async def is_computing() -> bool:
        return (await load_of(session, victim)).used_tokens > 0

    async with start_gateway() as gateway, asyncio.TaskGroup() as tasks:
        clients = tasks.create_task(ask_all(session, gateway, FRESH_PROMPTS, AT_ONCE))
        assert await until(is_computing, 30)
        cell = Cell("prefill dies while it computes, 8 under way")
        await victim.kill()
        answers = await clients
        cell.ended("both legs hung up, tried on p1 with a new room", "16 whole answers, the last after this time")
    assert wrong_answers(answers, references) == []
    assert len(answers) == len(FRESH_PROMPTS)


async def test_an_engine_that_freezes_and_then_dies_before_the_first_token_costs_no_client_its_answer(
    sglang: SglangFleet, session: aiohttp.ClientSession, references: dict[str, Answer], start_gateway: StartGateway
) -> None:
    """The one decode engine that is left freezes; d1 comes back, and has to take over."""
    await sglang["d1"].start(300)
    victim = sglang["d0"]
    async with start_gateway() as gateway:
        victim.freeze()

        async def has_been_asked() -> bool:
            return victim.unread_bytes() > SENT_BYTES

        async with asyncio.TaskGroup() as tasks:
            clients = tasks.create_task(ask_all(session, gateway, PROMPTS[20:28], at_once=4))
            assert await until(has_been_asked, 30)
            cell = Cell("decode freezes before its first token")
            answers = await clients
            elapsed_s = cell.ended("both legs hung up, tried on d1", "8 whole answers, the last after this time")
    assert wrong_answers(answers, references) == []
    assert elapsed_s < FROZEN_S
    await victim.kill()
    assert await idle_within(session, running(sglang), IDLE_S)
