"""Where gateways meet: a store carries bytes between them, keeps leases, a snapshot and counters. It decides nothing.

`memory` is for one process (and, over a socket, for the workers of one machine); `redis` for gateways anywhere. Both
pass one contract (tests/contracts/test_stores.py). Every method may raise StoreUnavailable, and nothing else: a gateway
then goes on with what it knows, and joins again later. No decision ever awaits a store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from gateway.core.errors import GatewayError

START = "0-0"
"""The position before the first entry of a shard."""


class StoreUnavailable(GatewayError):
    """The store does not answer, or not as it should: away, slow, read-only, full, failing over."""

    status = 503
    kind = "store_unavailable"


class Entry(NamedTuple):
    """One entry of a shard."""

    position: str
    data: bytes


class Store(Protocol):
    """A set of streams (shards), leases, one snapshot and counters, shared by gateways of one namespace."""

    async def open(self) -> str:
        """Connects. The store's generation: a name that changes when it lost what it held."""
        ...

    async def close(self) -> None:
        """Ends all connections."""
        ...

    async def append(self, shard: int, data: bytes) -> None:
        """Adds an entry at the end of a shard, which drops old ones to stay in its bound."""
        ...

    async def end(self, shard: int) -> str:
        """The position of the last entry of a shard; START when there is none."""
        ...

    async def covers(self, shard: int, position: str) -> bool:
        """Whether all that was appended after that position is there to be read."""
        ...

    async def read(self, shard: int, after: str, *, wait_s: float) -> Sequence[Entry]:
        """The next entries after a position, in order; none when none came within `wait_s` seconds."""
        ...

    async def acquire(self, name: str, owner: str, *, ttl_s: float) -> int | None:
        """Takes or renews a lease for `ttl_s` seconds: its fencing token, which grows with every new holder and stays
        while the holder does; None while another holds it."""
        ...

    async def release(self, name: str, owner: str) -> None:
        """Gives a lease back; nothing when that owner does not hold it."""
        ...

    async def save_snapshot(self, parts: Sequence[bytes]) -> None:
        """Replaces the snapshot as a whole: whoever reads sees the old one or the new one."""
        ...

    async def load_snapshot(self) -> Sequence[bytes] | None:
        """The parts of the snapshot; None without one."""
        ...

    async def spend(self, amounts: Mapping[str, int], *, window: int, window_s: float) -> Mapping[str, int]:
        """Adds what this gateway consumed of each named budget (a tenant's tokens, a fairness share) in the numbered
        window, and tells what all gateways together consumed of it so far. A window is forgotten after two of its own
        lengths. Amounts of 0 only ask."""
        ...
