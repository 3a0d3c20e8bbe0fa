"""Which engines hold a block, written once per distinct set of holders instead of once per block.

Millions of blocks share few sets: the blocks of one prompt were computed together, are held by the same engines and are
dropped together. So a block stores only the *id* of its set (0: nobody), and this file keeps the sets:

    id      device plane       host plane        ...     block count     name
    0       0000000000...      0000000000...                       -        0
    1       1000000000...      0000000000...               4,194,304      z(engine 0, device)
    2       1010000000...      0000000000...                  12,288      z(engine 0, device) ^ z(engine 2, device)
    ...     one bit per engine row, one plane per tier, planes made when a tier is first seen

A set's *name* is the exclusive or of one fixed random number per (engine, tier) in it. "This set plus that engine" has
a name that is one operation away, and a hash table from names to ids says whether that set exists already. An id whose
block count falls to zero is used again.

To forget an engine is to clear its column of bits: one pass over the sets, none over the blocks. Two sets may become
equal by that (they go on side by side, one of them nameless), and a set may become empty: its blocks are *dead*, held
by nobody, and the index sweeps them out later.

The number of sets is bounded. When no id is left, a block whose new set cannot be written down is held by nobody from
then on: the index may know too little, never something wrong. `refused_count` counts how often.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from gateway.core.hash_table import HashTable, Words

SetIds: TypeAlias = NDArray[np.int64]

EMPTY = 0
"""The id of the set without holders."""

TIER_COUNT = 4
_BITS = 64
_MASK = (1 << _BITS) - 1


class HolderSets:
    """Interned sets of (engine row, tier), with a count of the blocks that each set stands for."""

    def __init__(self, capacity: int) -> None:
        """At most `capacity` distinct sets besides the empty one."""
        self.capacity = capacity
        self.refused_count = 0
        """How often a set could not be written down because no id was left."""
        self.dead_ids: set[int] = set()
        """Ids of sets that became empty while blocks still carry them."""
        self._word_count = 1
        self._planes: list[Words | None] = [None] * TIER_COUNT
        self._names = np.zeros(16, np.uint64)
        self._block_counts = np.zeros(16, np.int64)
        self._ids_by_name = HashTable(capacity + 1)
        self._ids_by_name.insert(np.zeros(1, np.uint64))
        self._next_id = 1
        self._free_ids: list[int] = []
        self._steps: dict[tuple[int, int, int, bool], int] = {}

    def __len__(self) -> int:
        """How many ids are in use, the empty set's not counted."""
        return self._next_id - 1 - len(self._free_ids)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all arrays, whether touched yet or not."""
        arrays = [self._names, self._block_counts, *(plane for plane in self._planes if plane is not None)]
        return sum(array.nbytes for array in arrays) + self._ids_by_name.allocated_bytes

    def widen(self, row_count: int) -> None:
        """Makes room for engine rows 0 .. row_count - 1."""
        words = -(-row_count // _BITS)
        if words > self._word_count:
            added = words - self._word_count
            self._planes = [None if p is None else np.pad(p, ((0, 0), (0, added))) for p in self._planes]
            self._word_count = words

    def with_holder(self, ids: SetIds, row: int, tier: int, held: bool) -> SetIds:
        """The ids of these (distinct) sets after adding or removing one holder, shape of `ids`."""
        if len(ids) != 1:
            return self._step(ids, row, tier, held)
        step = (int(ids[0]), row, tier, held)
        if step not in self._steps:
            if len(self._steps) >= 4096:
                self._steps.clear()
            self._steps[step] = int(self._step(ids, row, tier, held)[0])
        return np.array([self._steps[step]])

    def holds(self, set_id: int, row: int, tier: int) -> bool:
        """Whether that engine is in the set, on that tier."""
        plane = self._planes[tier]
        word, bit = divmod(row, _BITS)
        return plane is not None and bool(int(plane[set_id, word]) >> bit & 1)

    def move(self, old_ids: SetIds, new_ids: SetIds, block_counts: NDArray[np.int64]) -> None:
        """Accounts for blocks that changed sets; `old_ids` are distinct. Sets without blocks are forgotten."""
        np.add.at(self._block_counts, new_ids, block_counts)
        self._block_counts[old_ids] -= block_counts
        self._block_counts[EMPTY] = 0
        unused = old_ids[(self._block_counts[old_ids] == 0) & (old_ids != EMPTY)]
        if len(unused):
            self._forget(unused)

    def clear_row(self, row: int) -> None:
        """Removes that engine from every set, on every tier."""
        word, bit = divmod(row, _BITS)
        changed = np.zeros(self._next_id, np.bool_)
        renamed = self._names[: self._next_id].copy()
        for tier, plane in enumerate(self._planes):
            if plane is not None:
                column = plane[: self._next_id, word]
                has = (column >> np.uint64(bit)) & np.uint64(1) == 1
                column[has] ^= np.uint64(1 << bit)
                renamed[has] ^= _member_name(row, tier)
                changed |= has
        ids = np.flatnonzero(changed)
        self._unname(ids)
        self._names[ids] = renamed[ids]
        self._rename(ids)

    def block_count(self, row: int) -> int:
        """How many blocks that engine holds, on whatever tier."""
        word, bit = divmod(row, _BITS)
        has = np.zeros(self._next_id, np.bool_)
        for plane in self._planes:
            if plane is not None:
                has |= (plane[: self._next_id, word] >> np.uint64(bit)) & np.uint64(1) == 1
        return int(self._block_counts[: self._next_id][has].sum())

    def members(self, set_id: int) -> list[tuple[int, int]]:
        """The (row, tier) of every holder in that set."""
        found: list[tuple[int, int]] = []
        for tier, plane in enumerate(self._planes):
            if plane is not None:
                bits = np.flatnonzero(_bits(plane[set_id]))
                found += [(int(bit), tier) for bit in bits]
        return found

    def dead_block_count(self) -> int:
        """How many blocks carry a set that became empty."""
        return int(self._block_counts[list(self.dead_ids)].sum())

    def is_dead(self, ids: SetIds) -> NDArray[np.bool_]:
        """Whether nobody holds the blocks with these sets, shape of `ids`."""
        return np.equal(self._names[ids], 0)

    def prefix_blocks(self, ids: SetIds) -> NDArray[np.int64]:
        """Blocks from the first on that each engine holds without a gap, shape (tiers, rows).

        `ids` are the sets of a prompt's blocks in order, shape (blocks,). Row t of the result counts blocks held on
        tier t or a nearer one, so it grows with t.
        """
        starts = np.flatnonzero(ids[1:] != ids[:-1]) + 1
        starts = np.concatenate((np.zeros(1, np.int64), starts))
        run_ids = ids[starts]
        lengths = np.zeros((TIER_COUNT, self._word_count * _BITS), np.int64)
        held: Words | None = None
        for tier, plane in enumerate(self._planes):
            if plane is not None:
                on_tier = plane.take(run_ids, axis=0)
                held = on_tier if held is None else held | on_tier
                _fill_lengths(lengths[tier], held, starts, len(ids))
            elif tier:
                lengths[tier] = lengths[tier - 1]
        return lengths

    def _step(self, ids: SetIds, row: int, tier: int, held: bool) -> SetIds:
        """`with_holder` without memory."""
        word, bit = divmod(row, _BITS)
        plane = self._plane(tier)
        has = (plane[ids, word] >> np.uint64(bit)) & np.uint64(1) == 1
        moving = np.flatnonzero(has != held)
        names = self._names[ids[moving]] ^ _member_name(row, tier)
        slots = self._ids_by_name.find(names)
        targets = self._ids_by_name.values(np.maximum(slots, 0)).astype(np.int64)
        missing = np.flatnonzero(slots < 0)
        if len(missing):
            targets[missing] = self._make(ids[moving[missing]], names[missing], row, tier)
        new_ids = ids.copy()
        new_ids[moving] = targets
        return new_ids

    def _make(self, origins: SetIds, names: Words, row: int, tier: int) -> SetIds:
        """New ids for the sets `origins` with one holder changed, which have these names; EMPTY where ids ran out."""
        names, first, position = np.unique(names, return_index=True, return_inverse=True)
        new_ids = self._take_ids(len(names))
        made = np.flatnonzero(new_ids != EMPTY)
        ids, origins = new_ids[made], origins[first[made]]
        word, bit = divmod(row, _BITS)
        self._plane(tier)
        for plane in self._planes:
            if plane is not None:
                plane[ids] = plane[origins]
        self._plane(tier)[ids, word] ^= np.uint64(1 << bit)
        self._names[ids] = names[made]
        self._ids_by_name.set_values(self._ids_by_name.insert(names[made]), ids.astype(np.uint64))
        self.refused_count += len(names) - len(made)
        return new_ids[position]

    def _take_ids(self, count: int) -> SetIds:
        """Unused ids, shape (count,); EMPTY in place of those that the capacity does not allow."""
        ids = [self._free_ids.pop() for _ in range(min(count, len(self._free_ids)))]
        fresh = min(count - len(ids), self.capacity + 1 - self._next_id)
        ids.extend(range(self._next_id, self._next_id + fresh))
        self._next_id += fresh
        while self._next_id > len(self._names):
            self._grow()
        ids.extend([EMPTY] * (count - len(ids)))
        return np.array(ids, np.int64)

    def _grow(self) -> None:
        """Doubles the arrays (64 engines, 1 M sets, two tiers: 32 MB copied, some 10 ms, once)."""
        size = len(self._names)
        self._names = np.pad(self._names, (0, size))
        self._block_counts = np.pad(self._block_counts, (0, size))
        self._planes = [None if p is None else np.pad(p, ((0, size), (0, 0))) for p in self._planes]

    def _plane(self, tier: int) -> Words:
        """The bits of that tier, shape (ids, words); made when first asked for."""
        plane = self._planes[tier]
        if plane is None:
            plane = np.zeros((len(self._names), self._word_count), np.uint64)
            self._planes[tier] = plane
        return plane

    def _forget(self, ids: SetIds) -> None:
        """Gives back ids that no block carries."""
        self._unname(ids)
        self._names[ids] = 0
        for plane in self._planes:
            if plane is not None:
                plane[ids] = 0
        freed = ids.tolist()
        self._free_ids.extend(freed)
        self.dead_ids.difference_update(freed)

    def _unname(self, ids: SetIds) -> None:
        """Takes these ids out of the name table; those that never were in it (equals of another, dead) stay out."""
        self._steps.clear()
        slots = self._ids_by_name.find(self._names[ids])
        owners = self._ids_by_name.values(np.maximum(slots, 0)).astype(np.int64)
        self._ids_by_name.free(slots[(slots >= 0) & (owners == ids)])

    def _rename(self, ids: SetIds) -> None:
        """Puts ids with changed names into the name table, where no equal set is there yet."""
        self.dead_ids.update(ids[self._names[ids] == 0].tolist())
        ids = ids[self._ids_by_name.find(self._names[ids]) < 0]
        names, first = np.unique(self._names[ids], return_index=True)
        self._ids_by_name.set_values(self._ids_by_name.insert(names), ids[first].astype(np.uint64))


def _fill_lengths(lengths: NDArray[np.int64], held: Words, starts: NDArray[np.int64], block_count: int) -> None:
    """Writes for each engine bit the start of the first run that lacks it, or `block_count`, into lengths (rows,).

    `held` has shape (runs, words). The running AND of the runs loses each bit at most once, so it is enough to unpack
    the words in which something was lost, however many runs there are.
    """
    still: Words = np.bitwise_and.accumulate(held, axis=0)
    lost_at, word = np.nonzero(still[:-1] != still[1:])
    lost: Words = still[lost_at, word] & ~still[lost_at + 1, word]
    item, bit = np.nonzero(_bits(lost))
    lengths[word[item] * _BITS + bit] = starts[lost_at[item] + 1]
    lengths[np.flatnonzero(_bits(still[-1]))] = block_count


def _bits(words: Words) -> NDArray[np.uint8]:
    """The bits of each word, lowest first, shape (words, 64)."""
    octets = words.astype("<u8").view(np.uint8).reshape(-1, _BITS // 8)
    return np.unpackbits(octets, axis=1, bitorder="little")


def _member_name(row: int, tier: int) -> np.uint64:
    """The fixed random number of one (engine row, tier): the output function of SplitMix64."""
    word = (row * TIER_COUNT + tier + 1) * 0x9E3779B97F4A7C15 & _MASK
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    word = (word ^ word >> 27) * 0x94D049BB133111EB & _MASK
    return np.uint64(word ^ word >> 31)
