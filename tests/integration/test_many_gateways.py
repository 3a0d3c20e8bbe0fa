"""Three gateways in processes of their own, real Redis, emulated engines: one view, whoever dies."""

from __future__ import annotations

import asyncio
import itertools
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from loadtest.client import LoadClient
from tests.integration.gateways import LEASE_S, Town
from tests.integration.harness import a_chat
from tests.polling import until

pytestmark = pytest.mark.slow
NAMES = ("a", "b", "c")
PATIENCE_S = 20.0


@pytest.fixture
async def town(tmp_path) -> AsyncIterator[Town]:
    async with AsyncExitStack() as stack:
        built = await Town.build(stack, tmp_path)
        await asyncio.gather(*(built.add(name) for name in NAMES))
        await until(lambda: knows(built, peers=2), timeout_s=PATIENCE_S)
        yield built


async def knows(town: Town, *, peers: int) -> bool:
    """Whether each gateway that answers knows so many others."""
    return all([(await town.store(name))["peers"] == peers for name in town.gateways])


async def send(town: Town, names: tuple[str, ...], count: int, *, at_once: int = 24, **chat: object) -> list[str]:
    """So many chats through these gateways in turn; what went wrong."""
    wrong: list[str] = []
    numbers = iter(range(count))
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(LoadClient(town.gateways[name].url)) for name in names]
        turns = itertools.cycle(clients)

        async def lane() -> None:
            for number in numbers:
                result = await next(turns).send(a_chat(f"question {number}", **chat))
                if result.error is not None or result.output_tokens == 0:
                    wrong.append(f"{result.error}: {result.detail}"[:200])

        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(lane())
    return wrong


async def test_after_2000_requests_each_gateway_counts_what_the_engines_count(town):
    assert await send(town, NAMES, 1970) == []
    async with running_on(town, 30):
        await until(town.agree, timeout_s=PATIENCE_S)
        assert sum(town.engines_own().values()) == 30
    await until(lambda: is_over(town), timeout_s=PATIENCE_S)


async def test_a_killed_gateways_reservations_are_gone_everywhere_within_the_lease(town):
    async with running_on(town, 30):
        await until(town.agree, timeout_s=PATIENCE_S)
        load = asyncio.create_task(send(town, ("a", "b"), 400))
        killed_at = asyncio.get_running_loop().time()
        await town.gateways.pop("c").kill()
        await until(lambda: knows(town, peers=1), timeout_s=PATIENCE_S)
        took_s = asyncio.get_running_loop().time() - killed_at
        assert await load == []
        await until(town.agree, timeout_s=PATIENCE_S)
        assert sum(town.engines_own().values()) == 20
        print(f"known everywhere {took_s:.2f} s after the kill; the lease is {LEASE_S:g} s")
    await until(lambda: is_over(town), timeout_s=PATIENCE_S)


async def test_redis_is_killed_under_load_and_starts_again_empty_and_no_request_fails(town):
    load = asyncio.create_task(send(town, NAMES, 1500))
    await until(lambda: sum(town.engines_own().values()) > 5, timeout_s=PATIENCE_S)
    town.redis.kill()
    await until(lambda: is_store(town, "away"), timeout_s=PATIENCE_S)
    statuses = [(await town.ready(name))[0] for name in NAMES]
    await town.redis.start()
    await until(lambda: is_store(town, "connected"), timeout_s=PATIENCE_S)
    assert await load == []
    assert statuses == [200, 200, 200]
    assert [gateway.said("store_away") for gateway in town.gateways.values()] == [1, 1, 1]
    await until(lambda: is_over(town), timeout_s=PATIENCE_S)


async def test_what_was_sent_while_redis_was_away_is_known_to_all_when_it_is_back(town):
    town.redis.kill()
    await until(lambda: is_store(town, "away"), timeout_s=PATIENCE_S)
    async with running_on(town, 30):
        await town.redis.start()
        back_at = asyncio.get_running_loop().time()
        await until(town.agree, timeout_s=PATIENCE_S)
        assert sum(town.engines_own().values()) == 30
        print(f"of one view {asyncio.get_running_loop().time() - back_at:.2f} s after it came back")


async def test_a_gateway_suspended_for_longer_than_its_leases_neither_releases_nor_doubles_anything(town):
    async with running_on(town, 30):
        await until(town.agree, timeout_s=PATIENCE_S)
        town.gateways["c"].signal(signal.SIGSTOP)
        await until(lambda: has_forgotten(town, "a", "b"), timeout_s=PATIENCE_S)
        town.gateways["c"].signal(signal.SIGCONT)
        await until(town.agree, timeout_s=PATIENCE_S)
        assert sum(town.engines_own().values()) == 30
    await until(lambda: is_over(town), timeout_s=PATIENCE_S)


async def test_two_gateways_of_one_id_count_as_two_and_say_so(town):
    await town.add("d", gateway_id="a")
    async with running_on(town, 40, names=(*NAMES, "d")):
        await until(town.agree, timeout_s=PATIENCE_S)
        assert sum(town.engines_own().values()) == 40
        await until(lambda: town.gateways["d"].said("store_same_id") == 1, timeout_s=PATIENCE_S)


async def test_a_gateway_that_stops_says_goodbye(town):
    await town.gateways.pop("c").stop()
    await until(lambda: knows(town, peers=1), timeout_s=LEASE_S)


async def has_forgotten(town: Town, *names: str) -> bool:
    """Whether these gateways hold the third one's reservations no more."""
    return all([(await town.store(name))["peers"] == 1 for name in names])


async def is_store(town: Town, state: str) -> bool:
    return all([(await town.store(name))["state"] == state for name in town.gateways])


async def is_over(town: Town) -> bool:
    return not any(town.engines_own().values()) and await town.agree()


@asynccontextmanager
async def running_on(town: Town, count: int, names: tuple[str, ...] = NAMES) -> AsyncIterator[None]:
    """So many streams that have begun and do not end while the block runs."""
    for name in ("d0", "d1"):
        town.fakes[name].slow_down(20.0)
    task = asyncio.create_task(send(town, names, count, at_once=count, max_tokens=20_000))
    try:
        await until(lambda: sum(town.engines_own()[name] for name in ("d0", "d1")) >= count, timeout_s=PATIENCE_S)
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        for name in ("d0", "d1"):
            town.fakes[name].slow_down(1.0)
