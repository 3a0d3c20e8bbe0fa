"""The network between engines: who listens at which side-channel address, and bandwidth shared by transfers.

Every engine has one port in and one port out of equal speed. A transfer runs at its fair share of the busier end, so
ten reads from one prefill engine take ten times as long as one, whoever reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from loadtest.kv_content import BlockContent


class KvSource(Protocol):
    """An engine that others read KV from."""

    id: str

    def read_blocks(self, block_ids: Sequence[int]) -> list[BlockContent]:
        """What these blocks hold at this instant, whoever owns them."""
        ...

    def reader_done(self, request_id: str, *, now: float) -> None:
        """The reader's notification: the held blocks can go."""
        ...

    def heartbeat(self, request_ids: Sequence[str], *, now: float) -> None:
        """A decode engine still wants the blocks of these requests."""
        ...


@dataclass(slots=True)
class _Transfer:
    source: str
    target: str
    remaining_bytes: float
    updated_at: float
    bytes_per_s: float = field(default=0.0)

    @property
    def done_at(self) -> float:
        return self.updated_at + self.remaining_bytes / self.bytes_per_s

    def advance(self, now: float) -> None:
        """Moves bytes up to `now`; an `updated_at` in the future is latency not over yet."""
        if now > self.updated_at:
            self.remaining_bytes = max(0.0, self.remaining_bytes - (now - self.updated_at) * self.bytes_per_s)
            self.updated_at = now


class Fabric:
    """Addresses and transfers of the engines attached to it. After any change, ask every engine for its next step."""

    def __init__(self, *, bytes_per_s: float = 25e9, latency_s: float = 1e-4) -> None:
        """The default is a 200 Gbit/s port, as between the nodes of the Mooncake paper's clusters (up to 8 of them)."""
        self.bytes_per_s = bytes_per_s
        self.latency_s = latency_s
        self._sources: dict[tuple[str, int], KvSource] = {}
        self._transfers: dict[tuple[str, str], _Transfer] = {}

    def attach(self, source: KvSource, host: str, port: int) -> None:
        """Lets `source` be read at that side-channel address, in place of whoever was there."""
        self._sources[host, port] = source

    def detach(self, host: str, port: int) -> None:
        """Nobody listens at that address any more."""
        self._sources.pop((host, port), None)

    def find(self, engine_id: str, host: str, port: int) -> KvSource | None:
        """The engine at that address, None when nobody is there or its id is another (it restarted)."""
        source = self._sources.get((host, port))
        return source if source is not None and source.id == engine_id else None

    def start(self, source: str, target: str, key: str, size_bytes: float, *, now: float) -> None:
        """Begins a transfer, named by its target and key."""
        self._advance(now)
        self._transfers[target, key] = _Transfer(source, target, size_bytes, now + self.latency_s)
        self._share()

    def cancel(self, target: str, key: str, *, now: float) -> None:
        """Ends a transfer early; unknown ones are ignored."""
        self._advance(now)
        self._transfers.pop((target, key), None)
        self._share()

    def next_done_at(self, target: str) -> float | None:
        """When the next transfer to `target` ends, as things stand."""
        if not self._transfers:
            return None
        return min((t.done_at for t in self._transfers.values() if t.target == target), default=None)

    def take_done(self, target: str, *, now: float) -> list[str]:
        """Keys of the transfers to `target` that have ended by `now`, earliest first."""
        done = sorted((t.done_at, key) for (to, key), t in self._transfers.items() if to == target and t.done_at <= now)
        if done:
            self._advance(now)
            for _, key in done:
                del self._transfers[target, key]
            self._share()
        return [key for _, key in done]

    def _advance(self, now: float) -> None:
        for transfer in self._transfers.values():
            transfer.advance(now)

    def _share(self) -> None:
        outgoing: dict[str, int] = {}
        incoming: dict[str, int] = {}
        for transfer in self._transfers.values():
            outgoing[transfer.source] = outgoing.get(transfer.source, 0) + 1
            incoming[transfer.target] = incoming.get(transfer.target, 0) + 1
        for transfer in self._transfers.values():
            busiest = max(outgoing[transfer.source], incoming[transfer.target])
            transfer.bytes_per_s = self.bytes_per_s / busiest
