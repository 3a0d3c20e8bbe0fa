"""A store in this process: what gateways in one process, and the workers of one machine over a socket, share.

`Hub` is the data, without IO: `MemoryStore` gives it the store's interface. The same structures that Redis keeps, with
the same bounds.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from secrets import token_hex
from time import monotonic

from gateway.stores import START, Entry

READ_COUNT = 128
"""Entries read at once."""
MAX_COUNTERS = 100_000


@dataclass(slots=True)
class _Lease:
    token: int = 0
    owner: str | None = None
    until_at: float = 0.0


@dataclass(slots=True)
class _Shard:
    """The entries of one shard, oldest first; positions are counted from 1."""

    entries: deque[bytes] = field(default_factory=deque)
    last: int = 0
    held_bytes: int = 0
    more: asyncio.Event = field(default_factory=asyncio.Event)


class Hub:
    """The data of a store. Bounded: each shard keeps its last `max_bytes` bytes of entries."""

    def __init__(self, *, shard_count: int, max_bytes: int, clock: Callable[[], float] = monotonic) -> None:
        self.generation = token_hex(8)
        self.snapshot: Sequence[bytes] | None = None
        self._clock = clock
        self._max_bytes = max_bytes
        self._shards = [_Shard() for _ in range(shard_count)]
        self._leases: dict[str, _Lease] = {}
        self._spent: dict[tuple[int, str], tuple[int, float]] = {}

    def append(self, shard_number: int, data: bytes) -> None:
        """Adds an entry and wakes those who wait for one."""
        shard = self._shards[shard_number]
        shard.entries.append(data)
        shard.last += 1
        shard.held_bytes += len(data)
        while shard.held_bytes > self._max_bytes and len(shard.entries) > 1:
            shard.held_bytes -= len(shard.entries.popleft())
        shard.more.set()
        shard.more = asyncio.Event()

    def end(self, shard_number: int) -> str:
        """The position of the last entry."""
        return _position(self._shards[shard_number].last)

    def covers(self, shard_number: int, position: str) -> bool:
        """Whether all entries after that position are there."""
        shard = self._shards[shard_number]
        return shard.last - len(shard.entries) <= _number(position) <= shard.last

    def read(self, shard_number: int, after: str) -> list[Entry]:
        """The next entries after a position."""
        shard = self._shards[shard_number]
        first = max(_number(after), shard.last - len(shard.entries)) + 1
        start = len(shard.entries) - (shard.last - first + 1)
        stop = min(len(shard.entries), start + READ_COUNT)
        return [Entry(_position(first + row - start), shard.entries[row]) for row in range(max(0, start), stop)]

    async def wait(self, shard_number: int, after: str) -> None:
        """Returns when there is an entry after that position."""
        while self._shards[shard_number].last <= _number(after):
            await self._shards[shard_number].more.wait()

    def acquire(self, name: str, owner: str, ttl_s: float) -> int | None:
        """Takes or renews a lease."""
        lease, now = self._leases.setdefault(name, _Lease()), self._clock()
        is_free = lease.owner is None or lease.until_at <= now
        if not is_free and lease.owner != owner:
            return None
        if is_free:
            lease.token += 1
        lease.owner, lease.until_at = owner, now + ttl_s
        return lease.token

    def release(self, name: str, owner: str) -> None:
        """Gives a lease back."""
        lease = self._leases.get(name)
        if lease is not None and lease.owner == owner:
            lease.owner = None

    def spend(self, amounts: Mapping[str, int], window: int, window_s: float) -> dict[str, int]:
        """Adds to the counters of a window; their sums."""
        now = self._clock()
        totals: dict[str, int] = {}
        for name, amount in amounts.items():
            before, until_at = self._spent.pop((window, name), (0, 0.0))
            spent = amount if until_at <= now else before + amount
            self._spent[window, name] = spent, now + 2 * window_s
            totals[name] = spent
        while self._spent:
            oldest = next(iter(self._spent))
            if self._spent[oldest][1] > now and len(self._spent) <= MAX_COUNTERS:
                break
            del self._spent[oldest]
        return totals


class MemoryStore:
    """The store's interface to a hub in this process."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    async def open(self) -> str:
        return self._hub.generation

    async def close(self) -> None:
        """Nothing to end."""

    async def append(self, shard: int, data: bytes) -> None:
        self._hub.append(shard, data)

    async def end(self, shard: int) -> str:
        return self._hub.end(shard)

    async def covers(self, shard: int, position: str) -> bool:
        return self._hub.covers(shard, position)

    async def read(self, shard: int, after: str, *, wait_s: float) -> Sequence[Entry]:
        entries = self._hub.read(shard, after)
        if entries:
            return entries
        try:
            async with asyncio.timeout(wait_s):
                await self._hub.wait(shard, after)
        except TimeoutError:
            return []
        return self._hub.read(shard, after)

    async def acquire(self, name: str, owner: str, *, ttl_s: float) -> int | None:
        return self._hub.acquire(name, owner, ttl_s)

    async def release(self, name: str, owner: str) -> None:
        self._hub.release(name, owner)

    async def save_snapshot(self, parts: Sequence[bytes]) -> None:
        self._hub.snapshot = tuple(parts)

    async def load_snapshot(self) -> Sequence[bytes] | None:
        return self._hub.snapshot

    async def spend(self, amounts: Mapping[str, int], *, window: int, window_s: float) -> Mapping[str, int]:
        return self._hub.spend(amounts, window, window_s)


def _position(number: int) -> str:
    return START if number == 0 else f"0-{number}"


def _number(position: str) -> int:
    return int(position.rpartition("-")[2])
