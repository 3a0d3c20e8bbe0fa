"""An engine's KV memory: a fixed number of blocks, counted references, and a prefix cache in the idle ones.

A block is blank, in use (referenced by one or more requests or by a hand-off hold), or idle: unreferenced but still
holding a known prefix, evicted least recently used first. Releasing a request puts its last block first in that
order, so a prefix outlives its continuations.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from loadtest.kv_content import BlockContent


@dataclass(frozen=True, slots=True)
class BlockStored:
    """Full blocks that became findable, first first. `token_ids` covers all of them; empty when tokens are unknown."""

    block_hashes: tuple[int, ...]
    parent_block_hash: int | None
    token_ids: tuple[int, ...]
    block_tokens: int
    lora: str = ""
    salt: str = ""


@dataclass(frozen=True, slots=True)
class BlockRemoved:
    """A block was evicted."""

    block_hash: int


@dataclass(frozen=True, slots=True)
class AllBlocksCleared:
    """The prefix cache was reset."""


KvEvent: TypeAlias = BlockStored | BlockRemoved | AllBlocksCleared


class KvCache:
    """The blocks of one engine. Every method is O(blocks it names)."""

    def __init__(self, *, block_count: int, block_tokens: int, has_events: bool = False) -> None:
        self.block_count = block_count
        self.block_tokens = block_tokens
        self._has_events = has_events
        self._blank = list(range(block_count - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._refs = [0] * block_count
        self._key_of: list[int | None] = [None] * block_count
        self._block_of: dict[int, int] = {}
        self._contents: dict[int, BlockContent] = {}
        self._events: list[KvEvent] = []

    @property
    def free_count(self) -> int:
        """Blocks that a new request could take, idle ones included."""
        return len(self._blank) + len(self._idle)

    @property
    def used_count(self) -> int:
        """Blocks referenced by someone."""
        return self.block_count - self.free_count

    def match_count(self, keys: Sequence[int]) -> int:
        """Length in blocks of the longest cached prefix."""
        count = 0
        for key in keys:
            if key not in self._block_of:
                break
            count += 1
        return count

    def can_allocate(self, matched_keys: Sequence[int], new_count: int, *, reserved_count: int = 0) -> bool:
        """Whether the cached blocks of these keys plus `new_count` others fit, leaving `reserved_count` free."""
        revived = sum(self._refs[self._block_of[key]] == 0 for key in matched_keys)
        return revived + new_count + reserved_count <= self.free_count

    def share(self, matched_keys: Sequence[int]) -> list[int]:
        """Takes a reference on each cached block of these keys; returns the block ids in order."""
        blocks = [self._block_of[key] for key in matched_keys]
        for block in blocks:
            if self._refs[block] == 0:
                del self._idle[block]
            self._refs[block] += 1
        return blocks

    def take(self, count: int) -> list[int]:
        """Takes `count` blocks out of the free ones, blank first, evicting idle ones; returns their ids."""
        assert count <= self.free_count, "the caller asks can_allocate first"
        blocks = []
        for _ in range(count):
            block = self._blank.pop() if self._blank else self._evict()
            self._refs[block] = 1
            self._contents.pop(block, None)
            blocks.append(block)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Gives back one reference on each block."""
        for block in reversed(blocks):
            self._refs[block] -= 1
            assert self._refs[block] >= 0, "a block was released twice"
            if self._refs[block] == 0:
                if self._key_of[block] is None:
                    self._blank.append(block)
                else:
                    self._idle[block] = None

    def publish(
        self,
        blocks: Sequence[int],
        keys: Sequence[int],
        *,
        parent: int | None = None,
        token_ids: Sequence[int] = (),
        lora: str = "",
        salt: str = "",
    ) -> None:
        """Makes full blocks findable under their keys. A key that is cached already keeps its first block."""
        fresh = [i for i, key in enumerate(keys) if key not in self._block_of]
        for i in fresh:
            self._key_of[blocks[i]] = keys[i]
            self._block_of[keys[i]] = blocks[i]
        if not (self._has_events and fresh):
            return
        first, size = fresh[0], self.block_tokens
        self._events.append(
            BlockStored(
                block_hashes=tuple(keys[first:]),
                parent_block_hash=keys[first - 1] if first else parent,
                token_ids=tuple(token_ids[first * size : len(keys) * size]),
                block_tokens=size,
                lora=lora,
                salt=salt,
            )
        )

    def adopt(self, keys: Sequence[int], contents: Sequence[BlockContent] = ()) -> int:
        """Makes a prefix that arrived from elsewhere findable, as far as free blocks reach; how many blocks that is."""
        matched = self.match_count(keys)
        held = self.share(keys[:matched])
        fresh = self.take(min(len(keys) - matched, self.free_count))
        count = matched + len(fresh)
        for block, content in zip(fresh, contents[matched:count], strict=False):
            self.put_content(block, BlockContent(content.entry, content.exit, content.filled))
        self.publish(fresh, keys[matched:count], parent=keys[matched - 1] if matched else None)
        self.release([*held, *fresh])
        return count

    def cached(self, keys: Sequence[int]) -> dict[int, BlockContent]:
        """Copies of what the cached blocks of these keys hold, by key."""
        found = ((key, self.content(self._block_of[key])) for key in keys if key in self._block_of)
        return {key: BlockContent(content.entry, content.exit, content.filled) for key, content in found}

    def content(self, block: int) -> BlockContent:
        """The memory of a block, to read or to write; whatever is there, whoever owns it now."""
        if not 0 <= block < self.block_count:
            return BlockContent()
        return self._contents.setdefault(block, BlockContent())

    def put_content(self, block: int, content: BlockContent) -> None:
        """Overwrites the memory of a block with what arrived from elsewhere."""
        self._contents[block] = content

    def clear(self) -> bool:
        """Forgets every cached prefix; False (and nothing done) while any block is in use."""
        if self.used_count:
            return False
        for block in self._idle:
            self._key_of[block] = None
            self._blank.append(block)
        self._idle.clear()
        self._block_of.clear()
        if self._has_events:
            self._events.append(AllBlocksCleared())
        return True

    def take_events(self) -> list[KvEvent]:
        """The events since the last call, oldest first."""
        events, self._events = self._events, []
        return events

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        key = self._key_of[block]
        assert key is not None, "idle blocks are cached blocks"
        self._key_of[block] = None
        del self._block_of[key]
        if self._has_events:
            self._events.append(BlockRemoved(key))
        return block
