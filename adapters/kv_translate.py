"""An engine's block hashes turned into ours, by following its chain of parents.

A stored block comes with its tokens and the engine's hash of its parent. Knowing where our chain stands at that parent,
we advance it by the block (core/blocks.py) and note the pair of engine's hash and our state, for later events name the
block by the engine's hash alone: as a parent, as a block that moved to another tier, as one that was dropped. Nothing
depends on how the engine hashes. Our hashes are made of the states at the very end, for all blocks together.

Events are *folded*: of many events on one block and tier only the last counts, so a run of messages becomes at most one
BlocksRemoved and one BlocksStored per tier, and the cost per message sinks as the load rises.

Memory: 31 bytes per block and tier that the engine holds, for at most `max_blocks` per tier; blocks beyond that are
left out and counted. A parent we never saw (we joined late, messages were lost) makes an *orphan*: left out and counted
too. Both make the index know less than there is, never more.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from adapters.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    CacheEvent,
    EngineHash,
    engine_hashes,
    tier_of,
)
from gateway.core.blocks import MediaKey, advance, hash_content, hash_of, root, state_of
from gateway.core.events import BlocksCleared, BlocksRemoved, BlocksStored, Tier
from gateway.core.hash_table import HashTable, distinct

BlockEvent: TypeAlias = BlocksStored | BlocksRemoved | BlocksCleared

_DEPARTED_LIMIT = 8192
"""Dropped blocks still known as parents. An engine may hold a second copy of a block that it announced as dropped."""


class HashTranslator:
    """Turns decoded events of one cache (an engine's data-parallel rank) into events for the index."""

    def __init__(self, holder_id: str, *, max_blocks: int) -> None:
        """`holder_id` is the engine id that the events will carry; `max_blocks` >= 1 per tier."""
        self.holder_id = holder_id
        self.max_blocks = max_blocks
        self.orphan_count = 0
        """Blocks left out because their parent, or their own content, was never seen."""
        self.overflow_count = 0
        """Blocks left out because `max_blocks` were known."""
        self.block_tokens = 0
        """The engine's block size in tokens; 0 until it stored one."""
        self._states: dict[Tier, HashTable] = {}
        self._departed: dict[EngineHash, int] = {}
        self._window_groups: set[int] = set()

    def fold(self, events: Sequence[CacheEvent]) -> list[BlockEvent]:
        """What these events, in order, change in the index: a clearing or none, then per tier a removal and a store."""
        out: list[BlockEvent] = []
        clearings = [at for at, event in enumerate(events) if isinstance(event, AllBlocksCleared)]
        if clearings:
            out += self.forget()
            events = events[clearings[-1] + 1 :]
        latest = self._latest(events)
        for tier in Tier:
            changes = latest.get(tier)
            if changes:
                out += self._remove(tier, [name for name, state in changes.items() if state is None])
                out += self._store(tier, {name: state for name, state in changes.items() if state is not None})
        return out

    def forget(self) -> list[BlockEvent]:
        """The cache is empty, or what is in it is not known any more."""
        self._states.clear()
        self._departed.clear()
        return [BlocksCleared(self.holder_id)]

    def _latest(self, events: Sequence[CacheEvent]) -> dict[Tier, dict[EngineHash, int | None]]:
        """Per tier and block what the events leave behind: our state at a stored block, None for a removed one."""
        events = [event for event in events if self._is_prefix_cache(event)]
        stored = [event for event in events if isinstance(event, BlockStored)]
        contents = _contents(stored)
        known = self._known(stored)
        latest: dict[Tier, dict[EngineHash, int | None]] = {}
        for event in events:
            if isinstance(event, BlockStored):
                states = self._translate(event, contents, known)
                known.update(states)
                latest.setdefault(tier_of(event.medium), {}).update(states)
            elif isinstance(event, BlockRemoved):
                removed = dict.fromkeys(engine_hashes(event.block_hashes))
                latest.setdefault(tier_of(event.medium), {}).update(removed)
        return latest

    def _is_prefix_cache(self, event: CacheEvent) -> bool:
        """Whether the event is about the KV group whose blocks decide a prefix hit."""
        if isinstance(event, BlockStored) and event.group_idx is not None and not event.is_full_attention:
            self._window_groups.add(event.group_idx)
        if isinstance(event, BlockStored) and not event.is_full_attention:
            return False
        return isinstance(event, AllBlocksCleared) or event.group_idx not in self._window_groups

    def _known(self, stored: Iterable[BlockStored]) -> dict[EngineHash, int]:
        """Our states at those parents and bare blocks of the events that are known from before."""
        wanted: list[EngineHash] = []
        for event in stored:
            if event.parent_block_hash is not None:
                wanted += engine_hashes([event.parent_block_hash])
            if not event.token_ids:
                wanted += engine_hashes(event.block_hashes)
        known = {name: self._departed[name] for name in wanted if name in self._departed}
        names = _words(wanted)
        for table in self._states.values():
            slots = table.find(names)
            found = slots >= 0
            known.update(zip(names[found].tolist(), table.values(slots[found]).tolist(), strict=True))
        return known

    def _translate(
        self, event: BlockStored, contents: dict[int, NDArray[np.uint64]], known: dict[EngineHash, int]
    ) -> dict[EngineHash, int]:
        """The event's blocks with our states, without orphans."""
        names = engine_hashes(event.block_hashes)
        if not event.token_ids:
            states = {name: known[name] for name in names if name in known}
            self.orphan_count += len(names) - len(states)
            return states
        self.block_tokens = max(self.block_tokens, event.block_size)
        if event.parent_block_hash is None:
            parent: int | None = _start(event)
        else:
            parent = known.get(engine_hashes([event.parent_block_hash])[0])
        if parent is None:
            self.orphan_count += len(names)
            return {}
        return dict(zip(names, advance(parent, contents[id(event)]), strict=True))

    def _remove(self, tier: Tier, names: list[EngineHash]) -> list[BlockEvent]:
        table = self._states.get(tier)
        if table is None or not names:
            return []
        slots = distinct(table.find(_words(names)))
        slots = slots[slots >= 0]
        states = table.values(slots)
        self._departed.update(zip(table.keys(slots).tolist(), states.tolist(), strict=True))
        while len(self._departed) > _DEPARTED_LIMIT:
            del self._departed[next(iter(self._departed))]
        table.free(slots)
        return self._removed(tier, states)

    def _store(self, tier: Tier, pairs: dict[EngineHash, int]) -> list[BlockEvent]:
        if not pairs:
            return []
        table = self._states.setdefault(tier, HashTable(self.max_blocks))
        names, states = _words(pairs), _words(pairs.values())
        if len(table) + len(names) > self.max_blocks:
            fits = self._fitting(table, names)
            names, states = names[fits], states[fits]
        slots = table.insert(names)
        before = table.values(slots)
        table.set_values(slots, states)
        stored = BlocksStored(self.holder_id, self.block_tokens, hash_of(states), tier)
        return [*self._removed(tier, before[(before != 0) & (before != states)]), stored]

    def _removed(self, tier: Tier, states: NDArray[np.uint64]) -> list[BlockEvent]:
        return [BlocksRemoved(self.holder_id, self.block_tokens, hash_of(states), tier)] if len(states) else []

    def _fitting(self, table: HashTable, names: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which blocks are known already or among as many new ones as there is room for, first ones first."""
        is_new = table.find(names) < 0
        fits: NDArray[np.bool_] = ~is_new | (np.cumsum(is_new) <= self.max_blocks - len(table))
        self.overflow_count += int((~fits).sum())
        return fits


def _contents(stored: Iterable[BlockStored]) -> dict[int, NDArray[np.uint64]]:
    """Content hashes of the blocks of each event, by the event's id(); events of one block size are hashed together."""
    by_size: dict[int, list[BlockStored]] = {}
    for event in stored:
        if event.token_ids:
            by_size.setdefault(event.block_size, []).append(event)
    contents: dict[int, NDArray[np.uint64]] = {}
    for block_size, events in by_size.items():
        media: dict[int, list[MediaKey]] = {}
        tokens = array("Q")
        ends: list[int] = []
        for event in events:
            media.update((_last(ends) + block, keys) for block, keys in _media(event))
            tokens.extend(event.token_ids)
            ends.append(_last(ends) + len(event.block_hashes))
        hashed = hash_content(np.frombuffer(tokens, np.uint64).reshape(-1, block_size), media)
        for event, first, end in zip(events, [0, *ends], ends, strict=False):
            contents[id(event)] = hashed[first:end]
    return contents


def _last(ends: list[int]) -> int:
    return ends[-1] if ends else 0


def _words(numbers: Iterable[int]) -> NDArray[np.uint64]:
    """Unsigned 64-bit numbers as an array, several times as fast as np.array."""
    return np.frombuffer(array("Q", numbers), np.uint64)


def _media(event: BlockStored) -> Iterable[tuple[int, list[MediaKey]]]:
    """Block number within the event and its media keys, for blocks that have any."""
    for block, keys in enumerate(event.extra_keys or ()):
        media = [key for key in map(_media_key, keys or ()) if key is not None]
        if media:
            yield block, media


def _media_key(key: object) -> MediaKey | None:
    """An extra key of a block as a media key: `(id, offset)`, or the hash of prompt embeddings; None for other keys."""
    match key:
        case [media_id, int(offset)]:
            return str(media_id), offset
        case bytes():
            return key.hex(), 0
    return None


def _start(event: BlockStored) -> int:
    """The state before the first block, for an event without a parent."""
    lora_name = event.lora_name
    if lora_name is None and event.lora_id is not None:
        lora_name = f"#{event.lora_id}"
    salt = event.cache_salt
    if salt is None and event.extra_keys:
        # vLLM names the salt among the first block's extra keys, untagged, after the LoRA name.
        texts = [key for key in event.extra_keys[0] or () if isinstance(key, str) and key != event.lora_name]
        salt = texts[-1] if texts else None
    return state_of(root(event.block_size, lora_name=lora_name, cache_salt=salt))
