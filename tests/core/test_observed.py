import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.core.blocks import chain, root
from gateway.core.index import PrefixIndex
from gateway.core.observed import ObservedCache

HASHES = np.random.default_rng(1).integers(1, 2**64, 64, dtype=np.uint64)
TRACE = Path(__file__).parents[2] / "../shared/traces/conversation_trace.jsonl"


class Observer:
    """A cache model with the index it feeds."""

    def __init__(self, capacity_blocks=8, max_age_s=100.0):
        self.cache = ObservedCache("a", 16, capacity_blocks=capacity_blocks, max_age_s=max_age_s)
        self.index = PrefixIndex(max_blocks=1000)
        self.index.add_engine("a")

    def feed(self, events):
        for event in events:
            self.index.apply(event)

    def send(self, request_id, hashes, now=0.0):
        self.feed(self.cache.dispatched(request_id, hashes, now=now))

    def held(self):
        return [bool(self.index.match({1: HASHES[i : i + 1]}).cached_tokens[0]) for i in range(len(HASHES))]

    def held_numbers(self):
        return [number for number, is_held in enumerate(self.held()) if is_held]


class PlainLru:
    """A least-recently-used cache, block by block; the deeper block of a prompt counts as used earlier."""

    def __init__(self, capacity):
        self.capacity, self.blocks = capacity, OrderedDict()

    def use(self, prompt):
        """How many leading blocks hit, before the prompt is taken in."""
        hits = next((at for at, block in enumerate(prompt) if block not in self.blocks), len(prompt))
        for block in reversed(prompt[: self.capacity]):
            self.blocks[block] = None
            self.blocks.move_to_end(block)
        while len(self.blocks) > self.capacity:
            self.blocks.popitem(last=False)
        return hits


def test_a_prompt_counts_as_cached_from_its_dispatch_on():
    observer = Observer()
    observer.send("r", HASHES[:3])
    assert observer.held_numbers() == [0, 1, 2]


def test_a_failed_attempt_takes_back_only_what_nobody_else_used():
    observer = Observer()
    observer.send("other", HASHES[:2])
    observer.feed(observer.cache.finished("other", now=1.0))
    observer.send("r", HASHES[:5], now=2.0)
    observer.feed(observer.cache.failed("r"))
    assert observer.held_numbers() == [0, 1]


def test_what_was_confirmed_by_a_finish_survives_a_later_failure():
    observer = Observer()
    observer.send("r", HASHES[:3])
    observer.feed(observer.cache.finished("r", now=1.0))
    observer.feed(observer.cache.failed("r"))
    assert observer.held_numbers() == [0, 1, 2]


def test_requests_that_are_not_in_flight_change_nothing():
    cache = Observer().cache
    assert cache.finished("nobody", now=1.0) == []
    assert cache.failed("nobody") == []
    assert cache.dispatched("r", HASHES[:0], now=1.0) == []


def test_a_full_cache_drops_the_least_recently_used_prompt_from_its_end():
    observer = Observer(capacity_blocks=8)
    observer.send("old", HASHES[:4])
    observer.send("newer", HASHES[10:13], now=1.0)
    observer.send("newest", HASHES[20:23], now=2.0)
    assert observer.held_numbers() == [0, 1, 10, 11, 12, 20, 21, 22]


def test_using_a_prompt_again_protects_it():
    observer = Observer(capacity_blocks=8)
    observer.send("old", HASHES[:4])
    observer.send("newer", HASHES[10:14], now=1.0)
    observer.send("again", HASHES[:4], now=2.0)
    observer.send("newest", HASHES[20:22], now=3.0)
    assert observer.held_numbers() == [0, 1, 2, 3, 10, 11, 20, 21]


def test_of_a_prompt_longer_than_the_cache_the_beginning_is_kept():
    observer = Observer(capacity_blocks=8)
    observer.send("r", HASHES[:20])
    assert observer.held_numbers() == list(range(8))


def test_blocks_unused_for_the_age_limit_are_taken_as_gone():
    observer = Observer(max_age_s=10.0)
    observer.send("old", HASHES[:4])
    observer.send("young", HASHES[:2], now=5.0)
    observer.feed(observer.cache.expire(now=12.0))
    assert observer.held_numbers() == [0, 1]
    observer.feed(observer.cache.expire(now=16.0))
    assert observer.held_numbers() == []


def test_a_restarted_engine_holds_nothing_and_can_have_another_capacity():
    observer = Observer()
    observer.send("r", HASHES[:4])
    observer.feed(observer.cache.reset(capacity_blocks=2))
    assert observer.held_numbers() == []
    observer.send("r", HASHES[:4])
    assert observer.held_numbers() == [0, 1]


prompts = st.tuples(st.integers(0, 50), st.integers(1, 14))


@settings(max_examples=60, deadline=None)
@given(st.lists(prompts, max_size=40), st.integers(1, 20))
def test_it_agrees_with_a_block_by_block_least_recently_used_cache(prompts, capacity):
    cache, plain = ObservedCache("a", 16, capacity_blocks=capacity, max_age_s=1e9), PlainLru(capacity)
    for at, (first, count) in enumerate(prompts):
        hashes = HASHES[first : first + count]
        cache.dispatched("r", hashes, now=float(at))
        plain.use(hashes.tolist())
        assert held_by(cache) == set(plain.blocks)
        assert cache._recorded_count <= 4 * capacity


def held_by(cache):
    return set(HASHES[cache._last_use.find(HASHES) >= 0].tolist())


@pytest.mark.slow
@pytest.mark.skipif(not TRACE.exists(), reason=f"no conversation trace at {TRACE}")
def test_one_cache_of_three_million_tokens_hits_on_the_conversation_trace_as_often_as_a_plain_lru():
    requests = [json.loads(line) for line in TRACE.read_text().splitlines()[:3000]]
    cache, plain = ObservedCache("a", 1, capacity_blocks=3_000_000 // 512, max_age_s=1e9), PlainLru(3_000_000 // 512)
    index, hits, plain_hits = PrefixIndex(max_blocks=10_000), 0, 0
    index.add_engine("a")
    for at, request in enumerate(requests):
        prompt = request["hash_ids"][: request["input_length"] // 512]
        hashes = chain(root(512), np.array(prompt, np.int64), 1)
        hits += int(index.match({1: hashes}).cached_tokens[0])
        plain_hits += plain.use(prompt)
        for event in cache.dispatched("r", hashes, now=float(at)):
            index.apply(event)
    assert hits == plain_hits > 4000
