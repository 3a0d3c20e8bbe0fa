"""What every store does: the memory store, the same over a socket, Redis, and a Redis Cluster, alike."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from gateway.stores import START, Store
from gateway.stores.memory import Hub, MemoryStore
from gateway.stores.redis import RedisSettings, RedisStore
from gateway.stores.socket import SocketStore, serving_hub
from tests.polling import until
from tests.redis_server import RedisServer, redis_server

SHARDS = 4
KINDS = ("memory", "socket", "redis", "redis_cluster")


@pytest.fixture(params=KINDS)
async def stores(request, tmp_path) -> AsyncIterator[tuple[Store, Store]]:
    """Two gateways' ends of one store."""
    async with AsyncExitStack() as stack:
        if request.param == "memory":
            hub = Hub(shard_count=SHARDS, max_bytes=2**20)
            pair: tuple[Store, Store] = MemoryStore(hub), MemoryStore(hub)
        elif request.param == "socket":
            hub = Hub(shard_count=SHARDS, max_bytes=2**20)
            await stack.enter_async_context(serving_hub(tmp_path / "hub", hub))
            pair = SocketStore(tmp_path / "hub"), SocketStore(tmp_path / "hub")
        elif request.param == "redis":
            server = await stack.enter_async_context(redis_server())
            settings = RedisSettings(server.url, shard_count=SHARDS, max_bytes=2**20)
            pair = RedisStore(settings), RedisStore(settings)
        else:
            server = await stack.enter_async_context(redis_server("--cluster-enabled", "yes"))
            await become_cluster(server)
            url = server.url.replace("redis://", "redis+cluster://")
            settings = RedisSettings(url, shard_count=SHARDS, max_bytes=2**20)
            pair = RedisStore(settings), RedisStore(settings)
        for store in pair:
            await store.open()
            stack.push_async_callback(store.close)
        yield pair


async def become_cluster(server: RedisServer) -> None:
    """One node that has all slots: each command must still keep to one slot."""
    await server.command("CLUSTER", "ADDSLOTS", *range(16384))
    async with asyncio.timeout(10.0):
        while b"cluster_state:ok" not in await server.command("CLUSTER", "INFO"):
            await asyncio.sleep(0.02)


async def test_what_one_appends_the_other_reads_in_order(stores):
    one, other = stores
    for number in range(300):
        await one.append(1, b"entry %d" % number)
    read: list[bytes] = []
    position = START
    while len(read) < 300:
        entries = await other.read(1, position, wait_s=1.0)
        read += [entry.data for entry in entries]
        position = entries[-1].position
    assert read == [b"entry %d" % number for number in range(300)]
    assert position == await other.end(1)


async def test_shards_are_apart(stores):
    one, other = stores
    await one.append(0, b"zero")
    await one.append(3, b"three")
    assert [entry.data for entry in await other.read(3, START, wait_s=0.1)] == [b"three"]
    assert await other.read(2, START, wait_s=0.01) == []


async def test_a_reader_is_woken_by_an_entry_and_not_before(stores):
    one, other = stores
    reading = asyncio.create_task(other.read(0, await other.end(0), wait_s=10.0))
    await asyncio.sleep(0)
    await one.append(0, b"at last")
    async with asyncio.timeout(5.0):
        assert [entry.data for entry in await reading] == [b"at last"]


async def test_any_bytes_come_through(stores):
    one, other = stores
    data = bytes(range(256)) * 40
    await one.append(0, data)
    assert (await other.read(0, START, wait_s=1.0))[0].data == data


async def test_a_shard_keeps_its_bound_and_says_what_it_does_not_cover(stores):
    one, other = stores
    await one.append(0, b"the first")
    first = await other.end(0)
    assert await other.covers(0, first)
    for _ in range(500):
        await one.append(0, bytes(16_384))
    assert not await other.covers(0, first)
    assert await other.covers(0, await other.end(0))
    kept, position = 0, START
    while entries := await other.read(0, position, wait_s=0.01):
        kept, position = kept + len(entries), entries[-1].position
    assert 0 < kept < 400


async def test_a_lease_has_one_holder_until_its_end(stores):
    one, other = stores
    token = await one.acquire("listen/p0", "a", ttl_s=30.0)
    assert token is not None
    assert await other.acquire("listen/p0", "b", ttl_s=30.0) is None
    assert await one.acquire("listen/p0", "a", ttl_s=30.0) == token
    assert await other.acquire("listen/p1", "b", ttl_s=30.0) is not None


async def test_the_next_holder_gets_a_higher_token(stores):
    one, other = stores
    first = await one.acquire("listen/p0", "a", ttl_s=0.03)
    async with asyncio.timeout(5.0):
        while (second := await other.acquire("listen/p0", "b", ttl_s=30.0)) is None:
            await asyncio.sleep(0.005)
    assert first is not None
    assert second > first
    await one.release("listen/p0", "a")  # not its own any more
    assert await one.acquire("listen/p0", "a", ttl_s=1.0) is None
    await other.release("listen/p0", "b")
    third = await one.acquire("listen/p0", "a", ttl_s=1.0)
    assert third is not None
    assert third > second


async def test_a_snapshot_is_replaced_as_a_whole(stores):
    one, other = stores
    assert await other.load_snapshot() is None
    await one.save_snapshot([b"head", b"part", b""])
    assert list(await other.load_snapshot() or ()) == [b"head", b"part", b""]
    await other.save_snapshot([b"later"])
    assert list(await one.load_snapshot() or ()) == [b"later"]


async def test_the_generation_stays_while_nothing_is_lost(stores):
    one, other = stores
    assert await one.open() == await other.open()


async def test_budgets_are_added_up_over_gateways_and_windows_are_apart(stores):
    one, other = stores
    assert await one.spend({"a": 5, "b": 1}, window=7, window_s=60.0) == {"a": 5, "b": 1}
    assert await other.spend({"a": 2}, window=7, window_s=60.0) == {"a": 7}
    assert await one.spend({"a": 0}, window=7, window_s=60.0) == {"a": 7}
    assert await one.spend({"a": 1}, window=8, window_s=60.0) == {"a": 1}
    assert await one.spend({}, window=8, window_s=60.0) == {}


async def test_a_window_is_forgotten(stores):
    one, _ = stores
    await one.spend({"a": 5}, window=7, window_s=0.01)

    async def is_forgotten() -> bool:
        return await one.spend({"b": 0}, window=7, window_s=0.01) == {"b": 0} and (
            await one.spend({"a": 0}, window=7, window_s=0.0) == {"a": 0}
        )

    await until(is_forgotten)
