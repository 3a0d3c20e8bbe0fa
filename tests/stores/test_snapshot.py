from __future__ import annotations

import msgspec
import numpy as np
import pytest

from gateway.core.events import BlocksStored, FeedState, KvFeed, Tier
from gateway.core.scheduler import Scheduler
from gateway.core.types import Role
from gateway.stores.codec import MalformedMessage, UnknownVersion
from gateway.stores.snapshot import Head, facts_of, head_of, read_head, restore, stretches
from tests.builders import a_request, a_scheduler, an_engine, hashes

FACTS = {"block_tokens": 16, "kv_capacity_tokens": 64_000}


def a_warm_one() -> Scheduler:
    """p1 announces its blocks, p2 is observed; both hold some."""
    scheduler = a_scheduler(an_engine("p1", Role.PREFILL, **FACTS), an_engine("p2", Role.PREFILL, **FACTS))
    scheduler.apply(KvFeed("p1", FeedState.LIVE, ("p1",)), now=0.0)
    scheduler.apply(BlocksStored("p1", 16, hashes(*range(1, 2001))), now=0.0)
    scheduler.apply(BlocksStored("p1", 16, hashes(*range(5000, 5010)), Tier.HOST), now=0.0)
    scheduler.prefixes.sent_elsewhere(a_request(block_hashes={16: hashes(*range(1, 101))}), "p2", 0, now=0.0)
    return scheduler


def parts_of(scheduler: Scheduler, tokens: dict[str, int]) -> list[bytes]:
    return [head_of(scheduler, ("7-0",), tokens), *stretches(scheduler.prefixes)]


def a_cold_one() -> Scheduler:
    """It knows that the engines exist, and nothing of them."""
    return a_scheduler(an_engine("p1", Role.PREFILL), an_engine("p2", Role.PREFILL))


def cached(scheduler: Scheduler, *names: int) -> dict[str, int]:
    engines = [state.engine for state in scheduler.cluster.engines.values()]
    tokens = scheduler.prefixes.cached_tokens(
        a_request(prompt_tokens=99_999, block_hashes={16: hashes(*names)}), engines
    )
    return {engine.id: int(count) for engine, count in zip(engines, tokens, strict=True)}


def test_one_that_takes_it_over_believes_what_the_one_that_made_it_did():
    warm, cold = a_warm_one(), a_cold_one()
    head, *parts = parts_of(warm, {"p1": 3})
    assert read_head(head).positions == ("7-0",)
    for event in facts_of(read_head(head), cold):
        cold.apply(event, now=0.0)
    assert sum(restore(part, cold.prefixes, now=0.0) for part in parts) == 2010
    for names in (range(1, 2001), range(1, 50), range(5000, 5010), range(50, 150)):
        assert cached(cold, *names) == cached(warm, *names)
    assert cached(cold, *range(1, 51)) == {"p1": 800, "p2": 800}


def test_what_is_known_already_is_not_replaced_by_what_another_says():
    cold = a_scheduler(an_engine("p1", Role.PREFILL, block_tokens=32, kv_capacity_tokens=1))
    assert [event for event in facts_of(read_head(parts_of(a_warm_one(), {})[0]), cold)] == []


def test_an_engine_that_every_gateway_listens_to_itself_brings_no_stream_along():
    events = facts_of(read_head(parts_of(a_warm_one(), {})[0]), a_cold_one())
    assert not any(isinstance(event, KvFeed) for event in events)


def test_blocks_of_engines_that_are_not_known_here_are_ignored():
    stranger = a_scheduler(an_engine("other", Role.PREFILL, **FACTS))
    for part in parts_of(a_warm_one(), {})[1:]:
        restore(part, stranger.prefixes, now=0.0)
    assert len(stranger.prefixes.index) == 0


def test_taking_a_part_twice_is_taking_it_once():
    warm = a_warm_one()
    before = len(warm.prefixes.index)
    for part in parts_of(warm, {})[1:]:
        restore(part, warm.prefixes, now=0.0)
    assert len(warm.prefixes.index) == before


@pytest.mark.parametrize("data", [b"", b"\xc1", msgspec.msgpack.encode(["x"]), msgspec.msgpack.encode([1, [], 7])])
def test_a_head_that_makes_no_sense_is_refused(data):
    with pytest.raises(MalformedMessage):
        read_head(data)


def test_a_head_of_another_version_is_refused():
    with pytest.raises(UnknownVersion, match="version 9"):
        read_head(msgspec.msgpack.encode(Head(9, (), ())))


@pytest.mark.parametrize("data", [b"\x00", msgspec.msgpack.encode([[[["p1", "device"]], b"half"]])])
def test_a_part_that_makes_no_sense_is_refused(data):
    with pytest.raises(MalformedMessage):
        restore(data, a_warm_one().prefixes, now=0.0)


def test_a_block_takes_about_eight_bytes():
    scheduler = a_warm_one()
    scheduler.apply(BlocksStored("p1", 16, np.arange(10_000, 14_000, dtype=np.uint64)), now=0.0)
    size = sum(map(len, parts_of(scheduler, {})))
    assert size < 9 * len(scheduler.prefixes.index)
