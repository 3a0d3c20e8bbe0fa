"""What a router without KV events believes each engine has cached: the prompts that it sent there lately.

One dict from block hash to a bit set of engines answers for all engines in a single walk over the prompt; one ordered
dict per engine, oldest block first, bounds what is believed of it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gateway.policies.stage import MAX_ENGINES


class ApproximateIndex:
    """Block hash -> engines it was sent to; per engine least recently sent blocks go first."""

    def __init__(self, *, keep_s: float | None = None) -> None:
        """`keep_s`: blocks not sent again for so long are forgotten; None: only when there are too many."""
        self._keep_s = keep_s
        self._holders: dict[int, int] = {}
        self._sent: OrderedDict[str, OrderedDict[int, float]] = OrderedDict()
        """Engine id -> block hash -> when it was last sent there."""
        self._bits: dict[str, int] = {}

    def __len__(self) -> int:
        """Distinct blocks that some engine is believed to hold."""
        return len(self._holders)

    def block_count(self, engine_id: str) -> int:
        """Blocks that the engine is believed to hold."""
        return len(self._sent.get(engine_id, ()))

    def matched_blocks(self, hashes: Sequence[int], engine_ids: Sequence[str], *, now: float) -> NDArray[np.int64]:
        """How many of the blocks, from the first on, each engine is believed to hold; shape (engines,)."""
        bits = [self._bits.get(engine_id, 0) for engine_id in engine_ids]
        matched = np.zeros(len(bits), dtype=np.int64)
        holding = 0
        for engine_id, bit in zip(engine_ids, bits, strict=True):
            if bit:
                self._expire(engine_id, now)
                holding |= bit
        depth = 0
        for depth, block_hash in enumerate(hashes):
            still = holding & self._holders.get(block_hash, 0)
            if still != holding:
                left = holding ^ still
                matched[[bool(bit & left) for bit in bits]] = depth
                holding = still
            if not holding:
                return matched
        matched[[bool(bit & holding) for bit in bits]] = len(hashes)
        return matched

    def insert(self, engine_id: str, hashes: Sequence[int], *, max_blocks: int, now: float) -> None:
        """Believes from now on that the engine holds these blocks, and at most `max_blocks` in all."""
        sent = self._sent.get(engine_id)
        if sent is None:
            sent = self._meet(engine_id)
        self._sent.move_to_end(engine_id)
        bit = self._bits[engine_id]
        for block_hash in reversed(hashes[:max_blocks]):  # the first block last: prefixes are forgotten from their ends
            self._holders[block_hash] = self._holders.get(block_hash, 0) | bit
            sent[block_hash] = now
            sent.move_to_end(block_hash)
        while len(sent) > max_blocks:
            self._drop(sent.popitem(last=False)[0], bit)
        self._expire(engine_id, now)

    def _meet(self, engine_id: str) -> OrderedDict[int, float]:
        if len(self._sent) >= MAX_ENGINES:
            forgotten, blocks = self._sent.popitem(last=False)
            bit = self._bits.pop(forgotten)
            for block_hash in blocks:
                self._drop(block_hash, bit)
        used = 0
        for bit in self._bits.values():
            used |= bit
        self._bits[engine_id] = ~used & (used + 1)
        self._sent[engine_id] = OrderedDict()
        return self._sent[engine_id]

    def _expire(self, engine_id: str, now: float) -> None:
        if self._keep_s is None:
            return
        sent, bit = self._sent[engine_id], self._bits[engine_id]
        while sent and next(iter(sent.values())) < now - self._keep_s:
            self._drop(sent.popitem(last=False)[0], bit)

    def _drop(self, block_hash: int, bit: int) -> None:
        left = self._holders[block_hash] & ~bit
        if left:
            self._holders[block_hash] = left
        else:
            del self._holders[block_hash]
