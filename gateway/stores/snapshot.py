"""What a gateway that starts takes over from the others: a compact picture of the index, piece by piece. Pure.

    part 0          version, the position in each shard at which the picture was begun, facts of engines, their feeds
    part 1 ...      blocks: [[[row, tier], ...], hashes] for those of one stretch of the index with the same holders

It is made while the gateway goes on: a stretch at a time, each in a few milliseconds. So the picture is blurred: blocks
may have come and gone between its first and last part. Whoever loads it reads on from the positions of part 0, and what
happened since is told there again; storing twice is storing once, so the end is sharp. Reservations are not in it:
their owners tell them when asked, which is truer and takes no longer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from gateway.core.events import EngineFound, Event, FeedState, KvFeed, Tier
from gateway.core.prefixes import Prefixes
from gateway.core.scheduler import Scheduler
from gateway.stores.codec import HASH_BYTES, MalformedMessage, Name, UnknownVersion, Whole, packed, unpacked

VERSION = 1
STRETCH_BUCKETS = 8192
"""About 18,000 blocks of a full index: 144 KB, made in some 3 ms."""


class EngineFacts(Struct, array_like=True, frozen=True):
    """What was learnt of an engine, so that a gateway that starts need not wait for its first look."""

    id: Name
    block_tokens: Annotated[int, Meta(ge=1, le=2**20)] | None
    kv_capacity_tokens: Annotated[int, Meta(ge=1, le=2**40)] | None
    feed: FeedState
    token: Whole
    """Fencing token of the gateway that listens for all; 0: every gateway listens for itself."""
    rows: tuple[Name, ...]


class Head(Struct, array_like=True, frozen=True):
    """The first part."""

    version: int
    positions: tuple[str, ...]
    engines: tuple[EngineFacts, ...]


class Blocks(Struct, array_like=True, frozen=True):
    """Blocks with the same holders."""

    holders: tuple[tuple[Name, Tier], ...]
    hashes: bytes


_HEAD = msgspec.msgpack.Decoder(Head)
_PART = msgspec.msgpack.Decoder(tuple[Blocks, ...])
_ENCODER = msgspec.msgpack.Encoder()


def head_of(scheduler: Scheduler, positions: tuple[str, ...], tokens: dict[str, int]) -> bytes:
    """The first part; `positions` were taken before the first stretch."""
    prefixes = scheduler.prefixes
    engines = tuple(
        EngineFacts(
            feed.engine_id,
            scheduler.cluster.engines[feed.engine_id].engine.block_tokens,
            scheduler.cluster.engines[feed.engine_id].engine.kv_capacity_tokens,
            feed.state,
            tokens.get(feed.engine_id, 0),
            feed.rows,
        )
        for feed in prefixes.feeds()
        if feed.engine_id in scheduler.cluster.engines
    )
    return _ENCODER.encode(Head(VERSION, positions, engines))


def stretches(prefixes: Prefixes) -> Iterator[bytes]:
    """The other parts, each made when it is asked for."""
    index = prefixes.index
    for first in range(0, index.bucket_count, STRETCH_BUCKETS):
        held = index.held_in(first, STRETCH_BUCKETS)
        if held:
            yield _ENCODER.encode(tuple(Blocks(holders, packed(hashes)) for holders, hashes in held))


def read_head(data: bytes) -> Head:
    """The first part. Raises MalformedMessage, UnknownVersion."""
    try:
        head = _HEAD.decode(data)
    except msgspec.MsgspecError as error:
        raise MalformedMessage(f"not a snapshot: {error}") from None
    if head.version != VERSION:
        raise UnknownVersion(f"a snapshot of version {head.version}; this release reads {VERSION}")
    return head


def facts_of(head: Head, scheduler: Scheduler) -> list[Event]:
    """What the head tells of engines that are known here and of which less is known: events for the scheduler."""
    events: list[Event] = []
    for facts in head.engines:
        state = scheduler.cluster.engines.get(facts.id)
        if state is None:
            continue
        engine = state.engine
        learnt = replace(
            engine,
            block_tokens=engine.block_tokens or facts.block_tokens,
            kv_capacity_tokens=engine.kv_capacity_tokens or facts.kv_capacity_tokens,
        )
        if learnt != engine:
            events.append(EngineFound(learnt))
        if facts.token and facts.rows:
            events.append(KvFeed(facts.id, facts.feed, facts.rows))
    return events


def restore(data: bytes, prefixes: Prefixes, *, now: float) -> int:
    """Takes one further part into the index; how many blocks it had. Raises MalformedMessage."""
    try:
        parts = _PART.decode(data)
    except msgspec.MsgspecError as error:
        raise MalformedMessage(f"not a part of a snapshot: {error}") from None
    count = 0
    for part in parts:
        if len(part.hashes) % HASH_BYTES:
            raise MalformedMessage("half a block hash in a snapshot")
        hashes = unpacked(part.hashes)
        for row, tier in part.holders:
            prefixes.restore(row, tier, hashes, now=now)
        count += len(hashes)
    return count
