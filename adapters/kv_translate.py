"""An engine's block hashes turned into ours, by following its chain of parents.

A stored block comes with its tokens and the engine's hash of its parent. Knowing our hash of that parent, we compute
ours of the block (core/blocks.py) and note the pair, for later events name the block by the engine's hash alone: as a
parent, as a block that moved to another tier, as one that was dropped. Nothing depends on how the engine hashes.

Events are *folded*: of many events on one block and tier only the last counts, so a run of messages becomes at most one
BlocksRemoved and one BlocksStored per tier, and the cost per message sinks as the load rises.

Memory: 31 bytes per block and tier that the engine holds, for at most `max_blocks` per tier; blocks beyond that are
left out and counted. A parent we never saw (we joined late, messages were lost) makes an *orphan*: left out and counted
too. Both make the index know less than there is, never more.
"""

from __future__ import annotations

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
    engine_hash,
    tier_of,
)
from gateway.core.blocks import MediaKey, chain_content, hash_content, root
from gateway.core.events import BlocksCleared, BlocksRemoved, BlocksStored, Tier
from gateway.core.hash_table import HashTable

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
        self._ours: dict[Tier, HashTable] = {}
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
                out += self._remove(tier, [h for h, ours in changes.items() if ours is None])
                out += self._store(tier, {h: ours for h, ours in changes.items() if ours is not None})
        return out

    def forget(self) -> list[BlockEvent]:
        """The cache is empty, or what is in it is not known any more."""
        self._ours.clear()
        self._departed.clear()
        return [BlocksCleared(self.holder_id)]

    def _latest(self, events: Sequence[CacheEvent]) -> dict[Tier, dict[EngineHash, int | None]]:
        """Per tier and block what the events leave behind: our hash of a stored block, None for a removed one."""
        events = [event for event in events if self._is_prefix_cache(event)]
        stored = [event for event in events if isinstance(event, BlockStored)]
        contents = _contents(stored)
        known = self._known(stored)
        latest: dict[Tier, dict[EngineHash, int | None]] = {}
        for event in events:
            if isinstance(event, BlockStored):
                hashes = [engine_hash(value) for value in event.block_hashes]
                ours = self._translate(event, hashes, contents, known)
                known.update(ours)
                latest.setdefault(tier_of(event.medium), {}).update(ours)
            elif isinstance(event, BlockRemoved):
                removed = dict.fromkeys(engine_hash(value) for value in event.block_hashes)
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
        """Our hashes of those parents and bare blocks of the events that are known from before."""
        wanted: set[EngineHash] = set()
        for event in stored:
            if event.parent_block_hash is not None:
                wanted.add(engine_hash(event.parent_block_hash))
            if not event.token_ids:
                wanted.update(engine_hash(value) for value in event.block_hashes)
        known = {value: self._departed[value] for value in wanted if value in self._departed}
        names = np.array(sorted(wanted), np.uint64)
        for table in self._ours.values():
            slots = table.find(names)
            found = slots >= 0
            known.update(zip(names[found].tolist(), table.values(slots[found]).tolist(), strict=True))
        return known

    def _translate(
        self,
        event: BlockStored,
        hashes: Sequence[EngineHash],
        contents: dict[int, NDArray[np.uint64]],
        known: dict[EngineHash, int],
    ) -> dict[EngineHash, int]:
        """The event's blocks with our hashes, without orphans."""
        if not event.token_ids:
            ours = {value: known[value] for value in hashes if value in known}
            self.orphan_count += len(hashes) - len(ours)
            return ours
        self.block_tokens = max(self.block_tokens, event.block_size)
        if event.parent_block_hash is None:
            parent: int | None = _root(event)
        else:
            parent = known.get(engine_hash(event.parent_block_hash))
        if parent is None:
            self.orphan_count += len(hashes)
            return {}
        return dict(zip(hashes, chain_content(parent, contents[id(event)]).tolist(), strict=True))

    def _remove(self, tier: Tier, hashes: list[EngineHash]) -> list[BlockEvent]:
        table = self._ours.get(tier)
        if table is None or not hashes:
            return []
        names = np.array(hashes, np.uint64)
        slots = np.unique(table.find(names))
        slots = slots[slots >= 0]
        ours = table.values(slots)
        self._departed.update(zip(table.keys(slots).tolist(), ours.tolist(), strict=True))
        while len(self._departed) > _DEPARTED_LIMIT:
            del self._departed[next(iter(self._departed))]
        table.free(slots)
        return [BlocksRemoved(self.holder_id, self.block_tokens, ours, tier)] if len(ours) else []

    def _store(self, tier: Tier, pairs: dict[EngineHash, int]) -> list[BlockEvent]:
        if not pairs:
            return []
        table = self._ours.setdefault(tier, HashTable(self.max_blocks))
        names, ours = np.array(list(pairs), np.uint64), np.array(list(pairs.values()), np.uint64)
        if len(table) + len(names) > self.max_blocks:
            names, ours = self._fitting(table, names, ours)
        slots = table.insert(names)
        before = table.values(slots)
        table.set_values(slots, ours)
        replaced = before[(before != 0) & (before != ours)]
        removed = [BlocksRemoved(self.holder_id, self.block_tokens, replaced, tier)] if len(replaced) else []
        return [*removed, BlocksStored(self.holder_id, self.block_tokens, ours, tier)]

    def _fitting(
        self, table: HashTable, names: NDArray[np.uint64], ours: NDArray[np.uint64]
    ) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """The blocks that are known already and as many new ones as there is room for, first ones first."""
        is_new = table.find(names) < 0
        fits = ~is_new | (np.cumsum(is_new) <= self.max_blocks - len(table))
        self.overflow_count += int((~fits).sum())
        return names[fits], ours[fits]


def _contents(stored: Iterable[BlockStored]) -> dict[int, NDArray[np.uint64]]:
    """Content hashes of the blocks of each event, by the event's id(); events of one block size are hashed together."""
    by_size: dict[int, list[BlockStored]] = {}
    for event in stored:
        if event.token_ids:
            by_size.setdefault(event.block_size, []).append(event)
    contents: dict[int, NDArray[np.uint64]] = {}
    for block_size, events in by_size.items():
        media: dict[int, list[MediaKey]] = {}
        tokens: list[NDArray[np.int64]] = []
        first = 0
        for event in events:
            # Of pairs (token, next token) the first is the block's own.
            tokens.append(np.array(event.token_ids, np.int64).reshape(len(event.token_ids), -1)[:, 0])
            media.update((first + block, keys) for block, keys in _media(event))
            first += len(event.block_hashes)
        hashed = hash_content(np.concatenate(tokens).reshape(first, block_size), media)
        ends = np.cumsum([len(event.block_hashes) for event in events])[:-1]
        contents.update(zip(map(id, events), np.split(hashed, ends), strict=True))
    return contents


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


def _root(event: BlockStored) -> int:
    """Where the chain of an event without a parent starts."""
    lora_name = event.lora_name
    if lora_name is None and event.lora_id is not None:
        lora_name = f"#{event.lora_id}"
    salt = event.cache_salt
    if salt is None and event.extra_keys:
        # vLLM names the salt among the first block's extra keys, untagged, after the LoRA name.
        texts = [key for key in event.extra_keys[0] or () if isinstance(key, str) and key != event.lora_name]
        salt = texts[-1] if texts else None
    return root(event.block_size, lora_name=lora_name, cache_salt=salt)
