"""Prefix hash: the start of the prompt names an engine on a hash ring, which takes it unless it is overloaded."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from gateway.core.interfaces import PairTable
from gateway.core.types import Dispatch, Request
from gateway.policies.prompt_blocks import prompt_blocks
from gateway.policies.settings import require
from gateway.policies.stage import MAX_ENGINES, Costs, Stage, lexicographic, prefill_then_decode


@dataclass(frozen=True, slots=True)
class PrefixHash:
    """The ring's engine if its load is at most 1.25 of the mean; else the least loaded that is; else the ring's.

    The router hashes the first 256 token ids; here the chained hash of the last full block within them does the same
    (of the first block, when blocks are larger). A prompt without a full block goes to the fewest in flight.
    Source: baseline-policies section 5.3 (smg `prefix_hash`); number of points on the ring as in the vLLM router.
    """

    prefix_tokens: int = 256
    load_factor: float = 1.25
    ring_points_per_engine: int = 160

    def __post_init__(self) -> None:
        require(self.ring_points_per_engine > 0, "ring_points_per_engine > 0")

    def start(self, rng: random.Random) -> PrefixHashChooser:
        return PrefixHashChooser(self)


class PrefixHashChooser:
    """Keeps the ring of all engines it met."""

    def __init__(self, settings: PrefixHash) -> None:
        self._settings = settings
        self._ring = HashRing(settings.ring_points_per_engine)

    def costs(self, request: Request, pairs: PairTable, *, now: float) -> Costs:
        """The ring's engine or its substitute first, the others by requests in flight; shape (pairs,)."""
        key = self._key(request)

        def rule(stage: Stage) -> Costs:
            counts = stage.own_counts
            if key is None:
                return counts
            winner = self._ring.owner(key, stage.engine_ids)
            is_ok = counts <= self._settings.load_factor * (counts.sum() + 1) / len(counts)
            if counts.any() and not is_ok[winner] and is_ok.any():
                winner = int(np.argmin(np.where(is_ok, counts, np.inf)))
            return lexicographic(np.arange(len(stage)) != winner, counts)

        return prefill_then_decode(pairs, rule, rule)

    def dispatched(self, request: Request, dispatch: Dispatch, *, now: float) -> None:
        """Nothing to remember: the ring depends on the engines alone."""

    def _key(self, request: Request) -> int | None:
        blocks = prompt_blocks(request)
        if not blocks.hashes:
            return None
        within = self._settings.prefix_tokens // blocks.block_tokens
        return blocks.hashes[min(max(within, 1), len(blocks.hashes)) - 1]


class HashRing:
    """Consistent hashing of 64-bit keys onto engines: an engine that comes or goes moves only its own share of keys."""

    def __init__(self, points_per_engine: int) -> None:
        self._points_per_engine = points_per_engine
        self._engine_ids: dict[str, None] = {}
        self._points: list[tuple[int, str]] = []

    def owner(self, key: int, engine_ids: Sequence[str]) -> int:
        """Position in `engine_ids`, not empty, of the engine whose point is the next at or after the key."""
        for engine_id in engine_ids:
            if engine_id not in self._engine_ids:
                self._add(engine_id)
        position_of = {engine_id: position for position, engine_id in enumerate(engine_ids)}
        start = bisect_left(self._points, (key, ""))
        points = range(start, start + len(self._points))
        return next(
            position_of[engine_id]
            for _, engine_id in (self._points[point % len(self._points)] for point in points)
            if engine_id in position_of
        )

    def _add(self, engine_id: str) -> None:
        if len(self._engine_ids) >= MAX_ENGINES:
            oldest = next(iter(self._engine_ids))
            del self._engine_ids[oldest]
            self._points = [point for point in self._points if point[1] != oldest]
        self._engine_ids[engine_id] = None
        for number in range(self._points_per_engine):
            digest = blake2b(f"{engine_id}#{number}".encode(), digest_size=8).digest()
            self._points.append((int.from_bytes(digest, "little"), engine_id))
        self._points.sort()
