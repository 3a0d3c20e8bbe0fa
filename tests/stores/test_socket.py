"""The hub of the workers: a sibling that dies, sends nonsense or is slow costs the others nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from gateway.stores import START, StoreUnavailable
from gateway.stores.memory import Hub
from gateway.stores.socket import SocketStore, serving_hub


@pytest.fixture
async def path(tmp_path) -> AsyncIterator:
    async with serving_hub(tmp_path / "hub", Hub(shard_count=1, max_bytes=2**20)):
        yield tmp_path / "hub"


async def test_a_hub_that_is_not_there_is_unavailable(tmp_path):
    with pytest.raises(StoreUnavailable, match="cannot reach"):
        await SocketStore(tmp_path / "none").open()


async def test_a_store_that_was_not_opened_is_unavailable(path):
    with pytest.raises(StoreUnavailable, match="not connected"):
        await SocketStore(path).append(0, b"x")


@pytest.mark.parametrize(
    "nonsense", [b"\xff\xff\xff\xff", b"\x00\x00\x00\x03abc", b"\x00\x00\x00\x06\x93\x01\xa3foo\x90"]
)
async def test_one_that_sends_nonsense_loses_its_own_connection_only(path, nonsense):
    store = SocketStore(path)
    await store.open()
    reader, writer = await asyncio.open_unix_connection(str(path))
    writer.write(nonsense)
    async with asyncio.timeout(5.0):
        assert await reader.read() == b""
    writer.close()
    await store.append(0, b"x")
    assert [entry.data for entry in await store.read(0, START, wait_s=0.1)] == [b"x"]
    await store.close()


async def test_many_questions_at_once_each_get_their_own_answer(path):
    store = SocketStore(path)
    await store.open()
    waiting = asyncio.create_task(store.read(0, START, wait_s=5.0))
    tokens = await asyncio.gather(*(store.acquire(f"lease {n}", "me", ttl_s=1.0) for n in range(200)))
    assert tokens == [1] * 200
    assert await store.acquire("lease 7", "other", ttl_s=1.0) is None
    await store.append(0, b"at last")
    assert [entry.data for entry in await waiting] == [b"at last"]
    await store.close()


async def test_a_hub_that_goes_away_ends_what_waits(tmp_path):
    store = SocketStore(tmp_path / "hub")
    async with serving_hub(tmp_path / "hub", Hub(shard_count=1, max_bytes=2**20)):
        await store.open()
        waiting = asyncio.create_task(store.read(0, START, wait_s=5.0))
        await asyncio.sleep(0)
        await store.close()
    with pytest.raises(StoreUnavailable):
        await waiting
