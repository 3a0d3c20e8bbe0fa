"""What an engine that publishes no cache events probably holds: a model of its cache, kept from what we send it.

A prompt's blocks are taken as cached from the moment it is dispatched, so that the next turn or a twin follows it to
the same engine, and are confirmed when the request finishes. When an attempt fails, the blocks that it alone vouched
for go again. The engine drops what it used least recently, deepest blocks of a prompt first, and so does the model: at
the capacity that the engine itself reports, and, because its cache may be reset without a word, after an age limit.

Least recently used without a step per block: each use of a prompt is one *record* (stamp, time, hashes) at the end of a
queue, and a table maps each block to the stamp of its last use. A block whose stamp is that of the oldest record has
not been used since: those are the blocks to drop, found for the whole record at once. Blocks used again later have a
newer stamp and are skipped.

Everything that happens comes out as events for the index, so that guessed and announced blocks are stored alike.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gateway.core.events import BlocksCleared, BlocksRemoved, BlocksStored
from gateway.core.hash_table import HashTable, Slots, distinct
from gateway.core.types import BlockHashes

_CONFIRMED = np.uint64(1)
_STAMP_SHIFT = np.uint64(1)


@dataclass(slots=True)
class _Record:
    """One use of a prompt; `hashes` loses what was dropped or used again."""

    stamp: int
    used_at: float
    hashes: BlockHashes


class ObservedCache:
    """A least-recently-used model of one engine's prefix cache, bounded by `capacity_blocks`."""

    def __init__(self, engine_id: str, block_tokens: int, *, capacity_blocks: int, max_age_s: float) -> None:
        """An empty cache; `capacity_blocks` >= 1, blocks unused for `max_age_s` > 0 are taken as gone."""
        self.engine_id = engine_id
        self.block_tokens = block_tokens
        self.capacity_blocks = capacity_blocks
        self.max_age_s = max_age_s
        self._last_use = HashTable(capacity_blocks)
        self._records: deque[_Record] = deque()
        self._recorded_count = 0
        self._stamp = 0
        self._pending: dict[str, _Record] = {}

    def __len__(self) -> int:
        """How many blocks the engine is taken to hold."""
        return len(self._last_use)

    def dispatched(self, request_id: str, hashes: BlockHashes, *, now: float) -> list[BlocksStored | BlocksRemoved]:
        """A request with these block hashes was sent to the engine: what it will hold and drop for it."""
        events = self._use(hashes, now=now, confirmed=0)
        self._pending[request_id] = _Record(self._stamp, now, hashes)
        return events

    def finished(self, request_id: str, *, now: float) -> list[BlocksStored | BlocksRemoved]:
        """The request was answered, so its blocks were there a moment ago. Nothing for an unknown request."""
        record = self._pending.pop(request_id, None)
        return [] if record is None else self._use(record.hashes, now=now, confirmed=1)

    def failed(self, request_id: str) -> list[BlocksRemoved]:
        """The attempt failed: blocks that nobody but it used, and nobody confirmed, are not there."""
        record = self._pending.pop(request_id, None)
        if record is None:
            return []
        slots = self._slots_last_used_by(record)
        return self._drop(slots[self._last_use.values(slots) & _CONFIRMED == 0])

    def expire(self, *, now: float) -> list[BlocksRemoved]:
        """Drops the blocks unused for longer than the age limit."""
        events: list[BlocksRemoved] = []
        while self._records and now - self._records[0].used_at > self.max_age_s:
            record = self._records.popleft()
            self._recorded_count -= len(record.hashes)
            events += self._drop(self._slots_last_used_by(record))
        return events

    def reset(self, *, capacity_blocks: int | None = None) -> list[BlocksCleared]:
        """The engine restarted, or reported another capacity: it holds nothing that we know of."""
        self.capacity_blocks = capacity_blocks or self.capacity_blocks
        self._last_use = HashTable(self.capacity_blocks)
        self._records.clear()
        self._recorded_count = 0
        self._pending.clear()
        return [BlocksCleared(self.engine_id)]

    def _use(self, hashes: BlockHashes, *, now: float, confirmed: int) -> list[BlocksStored | BlocksRemoved]:
        """Takes the blocks as just used, after dropping the oldest others that leave no room for them."""
        hashes = hashes[: self.capacity_blocks]
        if not len(hashes):
            return []
        self._stamp += 1
        slots = self._last_use.find(hashes)
        is_new = slots < 0
        removed: list[BlocksRemoved] = []
        if not is_new.any():  # as at the end of nearly every request
            self._write(slots, self._last_use.values(slots) & _CONFIRMED, confirmed)
        else:
            known = slots[~is_new]
            # First of all the known blocks get the new stamp: then making room cannot drop them.
            if len(known):
                self._write(known, self._last_use.values(known) & _CONFIRMED, confirmed)
            new = distinct(hashes[is_new])
            removed = self._make_room(len(new))
            self._write(self._last_use.add(new), np.zeros(len(new), np.uint64), confirmed)
        self._records.append(_Record(self._stamp, now, hashes))
        self._recorded_count += len(hashes)
        self._compact()
        return [*removed, BlocksStored(self.engine_id, self.block_tokens, hashes)]

    def _write(self, slots: Slots, marks: NDArray[np.uint64], confirmed: int) -> None:
        """Gives the blocks the current stamp; a block once confirmed stays so."""
        stamp = np.uint64(self._stamp) << _STAMP_SHIFT
        self._last_use.set_values(slots, marks | stamp | np.uint64(confirmed))

    def _make_room(self, wanted: int) -> list[BlocksRemoved]:
        """Drops the least recently used blocks, the deepest of their prompt first, until `wanted` more fit."""
        events: list[BlocksRemoved] = []
        while (excess := len(self._last_use) + wanted - self.capacity_blocks) > 0:
            record = self._records[0]
            slots = self._slots_last_used_by(record)
            events += self._drop(slots[-excess:])
            if len(slots) <= excess:
                self._records.popleft()
                self._recorded_count -= len(record.hashes)
        return events

    def _slots_last_used_by(self, record: _Record) -> Slots:
        """The slots of the record's blocks that were not used since, in the order of the prompt."""
        slots = self._last_use.find(record.hashes)
        slots = slots[slots >= 0]
        _, first = np.unique(slots, return_index=True)
        slots = slots[np.sort(first)]
        latest: Slots = slots[self._last_use.values(slots) >> _STAMP_SHIFT == record.stamp]
        return latest

    def _drop(self, slots: Slots) -> list[BlocksRemoved]:
        if not len(slots):
            return []
        hashes = self._last_use.keys(slots)
        self._last_use.free(slots)
        return [BlocksRemoved(self.engine_id, self.block_tokens, hashes)]

    def _compact(self) -> None:
        """Keeps the records in proportion to the cache: hashes used again later are in a later record too."""
        if self._recorded_count <= 4 * self.capacity_blocks:
            return
        for record in self._records:
            record.hashes = self._last_use.keys(self._slots_last_used_by(record))
        self._records = deque(record for record in self._records if len(record.hashes))
        self._recorded_count = sum(len(record.hashes) for record in self._records)
