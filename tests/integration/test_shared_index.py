"""One index for many gateways: who listens to an engine, how that is handed over, how a gateway that starts is warm."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from loadtest.kv_publisher import KvEventSettings
from tests.integration.gateways import Town
from tests.integration.harness import CHAT, chat_body
from tests.polling import until

pytestmark = pytest.mark.slow
BLOCK = 16
WORDS = ("river", "stone", "cloud", "engine", "token", "paper", "light", "north")
HAND_OVER_S = 2.0
PATIENCE_S = 20.0
ANNOUNCING = KvEventSettings(replay_endpoint="tcp://127.0.0.1:0")


def a_text(seed: int, words: int = 300) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


async def build(stack: AsyncExitStack, folder, **fake) -> Town:
    town = await Town.build(
        stack,
        folder,
        "pd",
        engine={"block_tokens": BLOCK},
        fake={"has_prompt_tokens_details": True, **fake},
        settings="#ask_engine",
    )
    await asyncio.gather(town.add("a"), town.add("b"))
    return town


@pytest.fixture
async def town(tmp_path) -> AsyncIterator[Town]:
    """Two gateways in front of engines that announce their blocks."""
    async with AsyncExitStack() as stack:
        built = await build(stack, tmp_path, kv_events=ANNOUNCING)
        await until(lambda: all_know(built, "events"), timeout_s=PATIENCE_S)
        yield built


async def source(town: Town, name: str) -> str:
    return next(engine["prefixes"] for engine in (await town.ready(name))[1]["engines"] if engine["id"] == "p0")


async def all_know(town: Town, how: str) -> bool:
    return all([await source(town, name) == how for name in town.gateways])


async def listeners(town: Town) -> list[str]:
    """The gateways that listen to the prefill engine."""
    return [name for name in town.gateways if "p0" in (await town.store(name))["listens_to"]]


async def told_and_believed(town: Town, name: str, prompt: str) -> tuple[int, int]:
    """Cached tokens of one chat, by the engine's count and by that gateway's."""
    url = town.gateways[name].url + CHAT
    async with town.session.post(url, json=chat_body(prompt)) as response:
        assert response.status == 200
        told = (await response.json())["usage"]["prompt_tokens_details"]["cached_tokens"]
        return told, int(response.headers["x-sluice-cached-tokens"])


async def believes(town: Town, name: str, seeds: range) -> bool:
    """Whether that gateway believes for each of these prompts what the engine counts, and most of it cached."""
    pairs = [await told_and_believed(town, name, a_text(seed)) for seed in seeds]
    return all(told == believed > 200 for told, believed in pairs)


async def test_one_gateway_listens_and_both_know(town):
    assert len(await listeners(town)) == 1
    for seed in range(3):
        await told_and_believed(town, "a", a_text(seed))
    await until(lambda: believes(town, "b", range(3)), timeout_s=PATIENCE_S)
    await until(lambda: believes(town, "a", range(3)), timeout_s=PATIENCE_S)


async def test_a_listener_that_is_killed_is_followed_by_another_within_two_seconds_and_nothing_is_missing(town):
    (listener,) = await listeners(town)
    (other,) = set(town.gateways) - {listener}
    for seed in range(5):
        await told_and_believed(town, listener, a_text(seed))
    await until(lambda: believes(town, other, range(5)), timeout_s=PATIENCE_S)
    killed_at = asyncio.get_running_loop().time()
    await town.gateways.pop(listener).kill()
    assert town.fakes["p0"].reset_prefix_cache()  # while nobody listens
    told, _ = await told_and_believed(town, other, a_text(7))
    assert told == 0
    await until(lambda: is_only_listener(town, other), timeout_s=PATIENCE_S)
    took_s = asyncio.get_running_loop().time() - killed_at
    print(f"another listens {took_s:.2f} s after the kill")
    assert took_s < HAND_OVER_S + 1.0  # the machine's own delays are not ours
    await until(lambda: agrees(town, other, range(5)), timeout_s=PATIENCE_S)
    await until(lambda: believes(town, other, range(7, 8)), timeout_s=PATIENCE_S)
    assert await source(town, other) == "events"


async def is_only_listener(town: Town, name: str) -> bool:
    return await listeners(town) == [name]


async def agrees(town: Town, name: str, seeds: range) -> bool:
    """Whether that gateway believes what the engine counts, whatever that is."""
    pairs = [await told_and_believed(town, name, a_text(seed)) for seed in seeds]
    return all(told == believed for told, believed in pairs)


async def test_without_the_store_each_listens_itself_and_with_it_again_one(town):
    town.redis.kill()
    for seed in range(3):
        await told_and_believed(town, "a", a_text(seed))
    for name in town.gateways:
        await until(lambda name=name: believes(town, name, range(3)), timeout_s=PATIENCE_S)
    await town.redis.start()
    await until(lambda: has_one_listener(town), timeout_s=PATIENCE_S)
    await told_and_believed(town, "a", a_text(20))
    for name in town.gateways:
        await until(lambda name=name: believes(town, name, range(20, 21)), timeout_s=PATIENCE_S)
    assert await all_know(town, "events")


async def has_one_listener(town: Town) -> bool:
    return len(await listeners(town)) == 1


@pytest.mark.parametrize("kind", ["events", "observed"])
async def test_a_gateway_started_empty_believes_what_the_others_do_within_a_second(tmp_path, kind):
    async with AsyncExitStack() as stack:
        town = await build(stack, tmp_path, **({"kv_events": ANNOUNCING} if kind == "events" else {}))
        await until(lambda: all_know(town, kind), timeout_s=PATIENCE_S)
        prompts = range(40)
        for seed in prompts:
            await told_and_believed(town, "a", a_text(seed))
        await until(lambda: believes(town, "b", prompts), timeout_s=PATIENCE_S)
        await until(lambda: has_snapshot(town), timeout_s=PATIENCE_S)
        late = await town.add("late")
        await until(lambda: late.said("store_connected") > 0, timeout_s=PATIENCE_S)
        joined = next(line for line in late.lines if line.get("event") == "store_connected")
        pairs = [(await told_and_believed(town, "late", a_text(seed))) for seed in prompts]
        told, believed = (sum(column) for column in zip(*pairs, strict=True))
        print(f"{kind}: {believed / told:.2%} of what the engine counts, joined after {joined['away_s']} s")
        assert believed >= 0.99 * told > 0


async def has_snapshot(town: Town) -> bool:
    """Whether the snapshot that is there was begun after everything before was told."""
    before = await town.redis.command("GET", "{sluice:snapshot}")
    for _ in range(2):
        await until(lambda before=before: changed(town, before), timeout_s=PATIENCE_S)
        before = await town.redis.command("GET", "{sluice:snapshot}")
    return True


async def changed(town: Town, before: bytes) -> bool:
    return await town.redis.command("GET", "{sluice:snapshot}") not in (before, b"$-1")
