"""Which engine holds which KV block, and how much of a prompt every engine has cached.

The question asked for each request: given the chained hashes of its blocks (core/blocks.py), how many blocks from the
first on does each of up to a thousand engines hold, and how near? It is answered for all engines in one pass, because
two structures divide the work:

    hash table (core/hash_table.py)                    holder sets (core/holder_sets.py)
    block hash -> one word:                            set id -> one bit per engine and tier
        bits 0..31   id of the set of its holders
        bit 32       used since the hand last passed

1. The prompt's hashes go through the table together: n set ids, 0 where nobody holds the block.
2. Neighbouring blocks mostly have the same holders, so the n ids are a few *runs*. The bit sets of the runs are ANDed
   from the first on; the run at which an engine's bit disappears is where its prefix ends.

Ingestion is the same two steps backwards: find or insert the hashes, move each distinct old set "plus this engine" (or
minus) to its new id, write the ids. A hundred blocks of one event usually share one old and one new set.

**What is exact.** Up to `max_blocks` blocks and the bounded number of sets, the index equals a dict from hash to a set
of (engine, tier), whatever the order of announcements: storing twice is storing once, removing what is not there does
nothing, a tier is removed alone, a block nobody holds takes no room.

**When it is full.** CLOCK, the usual approximation of least recently used: a hand goes round the table and drops blocks
that no match and no renewed announcement has used since it last came by. Blocks of engines that left (see below) go
first. The hand's patience is bounded; when nearly all blocks are in use it drops some that are. A dropped block is one
the index does not know of any more: it can only underestimate, and `evicted_count` says how often.

**Forgetting an engine** (restart, cache reset, loss) clears one column of the holder sets: microseconds to a few
milliseconds, independent of the number of blocks. Blocks that nobody holds any more stay as *dead* words until the
stores that follow have swept them out, some hundred slots each.

**Memory** is 31 bytes per block of `max_blocks` for the table, allocated once: it never grows, so no store ever waits
for a rehash. There is at most one set per 16 blocks; their names take 2 bytes per block, and their bits up to 5 more if
every set exists, for 64 engines on four tiers (10 million blocks, 64 engines, 300 sets: 32.8 bytes per block).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from gateway.core.events import BlocksCleared, BlocksRemoved, BlocksStored, EngineFound, EngineLost, Event, Tier
from gateway.core.hash_table import HashTable, Slots, distinct
from gateway.core.holder_sets import EMPTY, TIER_COUNT, HolderSets
from gateway.core.types import BlockHashes

TIERS = tuple(Tier)
"""Nearest first: the second axis of `Match.tokens`."""

_TIER_NUMBER = {tier: number for number, tier in enumerate(TIERS)}
_SET_ID = np.uint64(0xFFFFFFFF)
_USED = np.uint64(1 << 32)
_BLOCKS_PER_SET = 16
_CHUNK_BLOCKS = 8192
"""Blocks stored at a time, so that the temporaries stay in the cache."""
_FIRST_BLOCKS = 128
"""Blocks looked up before the rest: a prompt whose cached part is short costs 50 us, not the price of its length."""
_SWEEP_BUCKETS = 256
"""Fewest buckets looked at per step of the hand: about 560 blocks of a full table."""
_PATIENCE = 16
"""Blocks the hand looks at for each it has to drop, before it becomes less choosy."""


@dataclass(frozen=True)
class Match:
    """How many prompt tokens each engine has cached, from the first token on without a gap."""

    engine_ids: tuple[str, ...]
    """Ascending."""
    tokens: NDArray[np.int64]
    """Shape (engines, tiers): tokens held on that tier or a nearer one (TIERS), so each row ascends."""

    @property
    def cached_tokens(self) -> NDArray[np.int64]:
        """Tokens held on any tier, shape (engines,)."""
        return self.tokens[:, -1]

    @property
    def device_tokens(self) -> NDArray[np.int64]:
        """Tokens held in device memory, shape (engines,)."""
        return self.tokens[:, 0]

    @cached_property
    def best(self) -> str | None:
        """The engine with the longest match; of equals the one that holds it nearest, then the lowest id."""
        if not self.engine_ids or not self.cached_tokens.any():
            return None
        rows = np.arange(len(self.engine_ids))
        for column in (TIER_COUNT - 1, *range(TIER_COUNT - 1)):
            tokens = self.tokens[rows, column]
            rows = rows[tokens == tokens.max()]
        return self.engine_ids[int(rows[0])]


class PrefixIndex:
    """Maps block hashes to the engines and tiers that hold them, for at most `max_blocks` blocks."""

    def __init__(self, *, max_blocks: int) -> None:
        """An empty index; `max_blocks` >= 1."""
        self.max_blocks = max_blocks
        self.evicted_count = 0
        """Blocks dropped, since the start, because the index was full."""
        self._table = HashTable(max_blocks)
        self._sets = HolderSets(max(1024, max_blocks // _BLOCKS_PER_SET))
        self._rows: dict[str, int] = {}
        self._free_rows: list[int] = []
        self._engine_ids: tuple[str, ...] = ()
        self._row_order = np.zeros(0, np.intp)
        self._hand = 0
        self._sweeper = 0

    def __len__(self) -> int:
        """How many blocks somebody holds."""
        return len(self._table) - self._sets.dead_block_count()

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all arrays, whether touched yet or not."""
        return self._table.allocated_bytes + self._sets.allocated_bytes

    @property
    def set_count(self) -> int:
        """How many distinct sets of holders there are."""
        return len(self._sets)

    @property
    def refused_set_count(self) -> int:
        """How often, since the start, a set of holders was not written down because there were too many."""
        return self._sets.refused_count

    def engine_block_count(self, engine_id: str) -> int:
        """How many blocks that engine holds on whatever tier; 0 for an unknown engine."""
        row = self._rows.get(engine_id)
        return 0 if row is None else self._sets.block_count(row)

    def apply(self, event: Event) -> None:
        """Takes in an event about engines or their blocks; every other event changes nothing."""
        match event:
            case BlocksStored():
                self.store(event.engine_id, event.hashes, event.tier)
            case BlocksRemoved():
                self.remove(event.engine_id, event.hashes, event.tier)
            case BlocksCleared():
                self.clear(event.engine_id)
            case EngineFound():
                self.add_engine(event.engine.id)
            case EngineLost():
                self.remove_engine(event.engine_id)

    def add_engine(self, engine_id: str) -> None:
        """Lets that engine hold blocks; nothing changes when it is known already."""
        if engine_id not in self._rows:
            row = self._free_rows.pop() if self._free_rows else len(self._rows)
            self._rows[engine_id] = row
            self._sets.widen(row + 1)
            self._order_rows()

    def remove_engine(self, engine_id: str) -> None:
        """Forgets that engine and what it holds."""
        self.clear(engine_id)
        row = self._rows.pop(engine_id, None)
        if row is not None:
            self._free_rows.append(row)
            self._order_rows()

    def clear(self, engine_id: str) -> None:
        """Forgets what that engine holds, on every tier."""
        row = self._rows.get(engine_id)
        if row is not None:
            self._sets.clear_row(row)

    def store(self, engine_id: str, hashes: BlockHashes, tier: Tier = Tier.DEVICE) -> None:
        """The engine holds these blocks on that tier. Ignored for an engine that is not, or no longer, known."""
        row = self._rows.get(engine_id)
        if row is None:
            return
        step = min(_CHUNK_BLOCKS, max(1, self.max_blocks // 4))
        for first in range(0, len(hashes), step):
            self._store(hashes[first : first + step], row, _TIER_NUMBER[tier])

    def remove(self, engine_id: str, hashes: BlockHashes, tier: Tier = Tier.DEVICE) -> None:
        """The engine dropped these blocks from that tier; those it did not hold there are ignored."""
        row = self._rows.get(engine_id)
        if row is None:
            return
        for first in range(0, len(hashes), _CHUNK_BLOCKS):
            slots = self._table.find(hashes[first : first + _CHUNK_BLOCKS])
            self._change(distinct(slots[slots >= 0]), row, _TIER_NUMBER[tier], held=False)

    @property
    def bucket_count(self) -> int:
        """How many buckets `held_in` counts in."""
        return self._table.bucket_count

    def held_in(self, first_bucket: int, bucket_count: int) -> list[tuple[tuple[tuple[str, Tier], ...], BlockHashes]]:
        """The blocks in that run of buckets (0 .. `bucket_count`), those with the same holders together: the engines
        with the tier on which each holds them, and the hashes. For a snapshot, piece by piece."""
        slots = self._table.slots_in(first_bucket, bucket_count)
        ids = self._set_ids(slots)
        hashes = self._table.keys(slots)
        names = {row: engine_id for engine_id, row in self._rows.items()}
        found = []
        for set_id in distinct(ids).tolist():
            holders = tuple((names[row], TIERS[tier]) for row, tier in self._sets.members(set_id) if row in names)
            if holders:
                found.append((holders, hashes[ids == set_id]))
        return found

    def match(self, block_hashes: Mapping[int, BlockHashes]) -> Match:
        """How much of a prompt every engine holds, given its block hashes for each block size in use.

        Engines whose block size is not among the keys show 0 tokens. A match counts as a use of the blocks.
        """
        lengths = np.zeros((TIER_COUNT, len(self._engine_ids)), np.int64)
        for block_tokens, hashes in block_hashes.items():
            ids = self._lookup(hashes)
            if len(ids):
                blocks = self._sets.prefix_blocks(ids)[:, self._row_order]
                np.maximum(lengths, blocks * block_tokens, out=lengths)
        return Match(self._engine_ids, lengths.T)

    def _order_rows(self) -> None:
        self._engine_ids = tuple(sorted(self._rows))
        self._row_order = np.array([self._rows[engine_id] for engine_id in self._engine_ids], np.intp)

    def _lookup(self, hashes: BlockHashes) -> NDArray[np.int64]:
        """Set ids of the leading blocks that are in the table, and marks them as used; shape (blocks found,)."""
        found: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
        first, behind = 0, _FIRST_BLOCKS
        while first < len(hashes):
            slots = self._table.find(hashes[first:behind])
            first, behind = behind, behind + _CHUNK_BLOCKS
            absent = slots < 0
            end = int(absent.argmax()) if absent.any() else len(slots)
            words = self._table.values(slots[:end])
            unused = np.flatnonzero(words < _USED)
            if len(unused):
                self._table.set_values(slots[unused], words[unused] | _USED)
            found.append((words & _SET_ID).astype(np.int64))
            if end < len(slots):
                break
        return np.concatenate(found)

    def _store(self, hashes: BlockHashes, row: int, tier: int) -> None:
        if self._sets.dead_ids:
            self._sweep_dead(len(hashes))
        if len(self._table) + len(hashes) > self.max_blocks:
            # Making room may drop blocks of this very batch, which then are new again.
            while (new := self._count_absent(hashes)) > self.max_blocks - len(self._table):
                self._make_room(new)
        slots = self._table.insert(hashes)
        if not self._is_held_alike(slots, row, tier):
            self._change(distinct(slots), row, tier, held=True)

    def _is_held_alike(self, slots: Slots, row: int, tier: int) -> bool:
        """Whether these blocks have one set of holders and the engine is in it, as in most announcements of what was
        known: then they are marked as used, and nothing else changes."""
        words = self._table.values(slots)
        ids = words & _SET_ID
        first = int(ids[0])
        if first == EMPTY or not (ids == ids[0]).all() or not self._sets.holds(first, row, tier):
            return False
        self._table.set_values(slots, words | _USED)
        return True

    def _count_absent(self, hashes: BlockHashes) -> int:
        return int((self._table.find(distinct(hashes)) < 0).sum())

    def _change(self, slots: Slots, row: int, tier: int, *, held: bool) -> None:
        """Adds or removes one holder of the blocks in these distinct slots; blocks left without any are freed."""
        if not len(slots):
            return
        words = self._table.values(slots)
        ids = (words & _SET_ID).astype(np.int64)
        if (ids == ids[0]).all():
            old_ids, counts = ids[:1], np.array([len(ids)])
            new_ids = self._sets.with_holder(old_ids, row, tier, held)
            changed = np.broadcast_to(new_ids, ids.shape)
        else:
            old_ids, position, counts = np.unique(ids, return_inverse=True, return_counts=True)
            new_ids = self._sets.with_holder(old_ids, row, tier, held)
            changed = new_ids[position]
        marks = words & _USED
        if held:
            marks[ids != EMPTY] = _USED
        self._table.set_values(slots, changed.astype(np.uint64) | marks)
        self._sets.move(old_ids, new_ids, counts)
        if not new_ids.all():
            self._table.free(slots[changed == EMPTY])

    def _make_room(self, wanted: int) -> None:
        """Drops blocks until `wanted` fit: dead ones, when they are found soon, then unused ones, then any."""
        patience = _PATIENCE * wanted
        looked = 0
        while (missing := len(self._table) + wanted - self.max_blocks) > 0:
            if self._sets.dead_ids and looked < patience:
                looked += self._sweep_dead(missing)
            else:
                looked += self._sweep_live(missing, spare_used=looked < 2 * patience)

    def _sweep_dead(self, block_count: int) -> int:
        """Moves the sweeper on by at least that many blocks and drops the dead among them; how many it looked at."""
        slots, self._sweeper = self._ahead(self._sweeper, block_count)
        self._drop(slots[self._sets.is_dead(self._set_ids(slots))])
        return len(slots)

    def _sweep_live(self, wanted: int, *, spare_used: bool) -> int:
        """Moves the hand on until it dropped `wanted` unused blocks, or a bit; how many blocks it looked at.

        What it passed and spared is no longer marked as used.
        """
        slots, hand = self._ahead(self._hand, wanted)
        words = self._table.values(slots)
        victims = np.flatnonzero((words < _USED) | (not spare_used))[:wanted]
        if len(victims) == wanted:
            passed = int(victims[-1]) + 1
            hand = self._table.bucket_after(int(slots[victims[-1]]))
            slots, words = slots[:passed], words[:passed]
        self._hand = hand
        self._table.set_values(slots, words & _SET_ID)
        self.evicted_count += len(victims)
        self._drop(slots[victims])
        return len(slots)

    def _ahead(self, bucket: int, block_count: int) -> tuple[Slots, int]:
        """The occupied slots from that bucket on, and the bucket behind them. About `block_count` in a full table."""
        buckets = max(_SWEEP_BUCKETS, block_count // 2)
        behind = bucket + buckets
        return self._table.slots_in(bucket, buckets), behind if behind < self._table.bucket_count else 0

    def _set_ids(self, slots: Slots) -> NDArray[np.int64]:
        return (self._table.values(slots) & _SET_ID).astype(np.int64)

    def _drop(self, slots: Slots) -> None:
        """Frees these distinct slots, whoever holds their blocks."""
        if len(slots):
            old_ids, counts = np.unique(self._set_ids(slots), return_counts=True)
            self._table.free(slots)
            self._sets.move(old_ids, np.zeros_like(old_ids), counts)
