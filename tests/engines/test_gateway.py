"""The gateway in front of real engines: a single engine's answers, whatever is killed or hung up."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable

import aiohttp
import pytest

from gateway.core.types import Role
from loadtest.vllm_process import BLOCK_TOKENS, VllmEngine, VllmFleet
from tests.engines.conftest import FRESH_PROMPTS, PROMPTS, until
from tests.engines.metrics import Metrics, read_metrics
from tests.engines.prompts import Answer, Prompt, ask, make_prompts, wrong_answers

pytestmark = [pytest.mark.engines, pytest.mark.asyncio(loop_scope="session")]

References = dict[str, dict[str, Answer]]
ANSWERS_AT_ONCE = 4
BUSY_PROMPTS = [prompt for prompt in PROMPTS if not prompt.name.endswith(("-1", "-2"))][-24:]
"""Prompts of 500 to 5,980 tokens: long enough to be caught half way."""
SENT_BYTES = 3000
"""More than the health checks and scrapes that wait at a frozen engine; less than one request of 500 tokens."""
DROPPED_COUNT = 50
IDLE_S = 3.0


async def ask_all(
    session: aiohttp.ClientSession, url: str, prompts: Iterable[Prompt], at_once: int
) -> dict[str, Answer]:
    """The answers by prompt name, with so many prompts under way at once."""
    slots = asyncio.Semaphore(at_once)

    async def ask_one(prompt: Prompt) -> tuple[str, Answer]:
        async with slots:
            return prompt.name, await ask(session, url, prompt)

    return dict(await asyncio.gather(*(ask_one(prompt) for prompt in prompts)))


async def read_all(session: aiohttp.ClientSession, urls: Iterable[str]) -> list[Metrics]:
    """A scrape of each engine."""
    return [await read_metrics(session, url) for url in urls]


def moved_tokens(metrics: Iterable[Metrics], source: str) -> float:
    """Prompt tokens over all these engines that came from the source."""
    return sum(each.prompt_tokens(source) for each in metrics)


async def test_forty_answers_equal_those_of_a_single_engine_and_their_kv_was_moved(
    gateway: str, fleet: VllmFleet, session: aiohttp.ClientSession, reference_answers: References
) -> None:
    references = reference_answers["forty"]
    decodes = fleet.urls(Role.DECODE)
    everyone = [engine.url for engine in fleet]
    before, failed_before = await read_all(session, decodes), await read_all(session, everyone)
    answers = await ask_all(session, gateway, PROMPTS, ANSWERS_AT_ONCE)
    assert wrong_answers(answers, references) == []
    assert answers.keys() == references.keys()

    after, failed_after = await read_all(session, decodes), await read_all(session, everyone)
    moved, found, computed = (
        moved_tokens(after, source) - moved_tokens(before, source)
        for source in ("external_kv_transfer", "local_cache_hit", "local_compute")
    )
    lengths = [answer.prompt_tokens for answer in references.values()]
    # What an earlier test left in a decode engine's prefix cache need not be moved again.
    assert moved + found >= sum(length // BLOCK_TOKENS * BLOCK_TOKENS for length in lengths)
    assert computed <= lengths.count(1)
    failed = [
        a.failed_transfer_count - b.failed_transfer_count for a, b in zip(failed_after, failed_before, strict=True)
    ]
    assert failed == [0] * len(failed)


async def test_each_answer_names_the_engines_that_made_it(
    gateway: str, fleet: VllmFleet, session: aiohttp.ClientSession
) -> None:
    for prompt in make_prompts(31, [150]):
        headers = (await ask(session, gateway, prompt)).headers
        assert headers["x-sluice-prefill"]
        assert headers["x-sluice-decode"]
        assert headers["x-sluice-prefill"] != headers["x-sluice-decode"]
        assert float(headers["x-sluice-decision-us"]) > 0


async def test_a_prefill_engine_killed_under_load_costs_no_client_its_answer(
    gateway: str, fleet: VllmFleet, session: aiohttp.ClientSession, reference_answers: References
) -> None:
    victim = fleet["p0"]

    async def is_computing() -> bool:
        return (await read_metrics(session, victim.url)).value("vllm:num_requests_running") > 0

    async with asyncio.TaskGroup() as tasks:
        clients = tasks.create_task(ask_all(session, gateway, FRESH_PROMPTS, at_once=12))
        assert await until(is_computing, 30)
        await victim.kill()
    answers = clients.result()
    assert wrong_answers(answers, reference_answers["fresh"]) == []
    assert answers.keys() == {prompt.name for prompt in FRESH_PROMPTS}


@pytest.mark.parametrize("name", ["p1", "d0"])
async def test_an_engine_killed_before_its_first_token_costs_no_client_its_answer_and_comes_back(
    name: str, gateway: str, fleet: VllmFleet, session: aiohttp.ClientSession, reference_answers: References
) -> None:
    victim = fleet[name]
    victim.freeze()
    async with asyncio.TaskGroup() as tasks:
        clients = tasks.create_task(ask_all(session, gateway, BUSY_PROMPTS, at_once=8))
        assert await until(lambda: has_been_asked(victim), 30)
        await victim.kill()
    answers = clients.result()
    assert wrong_answers(answers, reference_answers["forty"]) == []
    assert answers.keys() == {prompt.name for prompt in BUSY_PROMPTS}

    await fleet.start_missing()
    seeds = iter(range(1000, 2000))

    async def has_worked() -> bool:
        await ask_all(session, gateway, make_prompts(next(seeds), [200]), at_once=4)
        return (await read_metrics(session, victim.url)).value("vllm:generation_tokens_total") > 0

    assert await until(has_worked, 30)


async def has_been_asked(engine: VllmEngine) -> bool:
    """Whether a request waits unread at the frozen engine."""
    return engine.unread_bytes() > SENT_BYTES


async def test_fifty_dropped_clients_leave_every_engine_idle_within_three_seconds(
    gateway: str, fleet: VllmFleet, session: aiohttp.ClientSession, reference_answers: References
) -> None:
    rng = random.Random(50)
    prompts = [each for seed in range(40, 54) for each in make_prompts(seed, [rng.randrange(100, 4000)])]

    async def ask_and_leave(prompt: Prompt, start_s: float, stay_s: float) -> None:
        await asyncio.sleep(start_s)
        client = asyncio.create_task(ask(session, gateway, prompt, max_tokens=2000, ignore_eos=True))
        await asyncio.wait([client], timeout=stay_s)
        client.cancel()
        await asyncio.wait([client])

    stays = [(rng.uniform(0, 3), rng.expovariate(1)) for _ in range(DROPPED_COUNT)]
    await asyncio.gather(
        *(ask_and_leave(prompt, *stay) for prompt, stay in zip(prompts[:DROPPED_COUNT], stays, strict=True))
    )

    async def is_everyone_idle() -> bool:
        return all(each.busy_count == 0 for each in await read_all(session, [engine.url for engine in fleet]))

    assert await until(is_everyone_idle, IDLE_S), [
        (engine.spec.name, (await read_metrics(session, engine.url)).busy_count) for engine in fleet
    ]
    answers = await ask_all(session, gateway, PROMPTS[:8], at_once=4)
    assert wrong_answers(answers, {name: reference_answers["forty"][name] for name in answers}) == []
