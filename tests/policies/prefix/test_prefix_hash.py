"""Prefix hash: a ring, and a bound on what its choice may carry."""

import random

import pytest

from gateway.core.interfaces import PairTable
from gateway.policies.prefix.prefix_hash import HashRing, PrefixHash
from gateway.policies.stage import MAX_ENGINES
from tests.builders import a_load, a_pair_table, a_request, chosen, hashes

KEY = 123456789
PROMPT = a_request(prompt_tokens=300, block_hashes={128: hashes(7, KEY)})
OWNER = "abc"[HashRing(160).owner(KEY, "abc")]
OTHERS = [name for name in "abc" if name != OWNER]


def table(counts: dict[str, int]) -> PairTable:
    engines = [a_load(name, own_count=counts.get(name, 0)) for name in "abc"]
    return a_pair_table(engines, engines)


def pick(counts: dict[str, int], request: object = PROMPT) -> str:
    return chosen(PrefixHash().start(random.Random(0)), request, table(counts))[0]


def test_the_ring_decides_while_its_engine_is_not_overloaded() -> None:
    """3 engines, 5 + 4 + 2 = 11 in flight: at most 1.25 x 12 / 3 = 5."""
    assert pick({OWNER: 5, OTHERS[0]: 4, OTHERS[1]: 2}) == OWNER


def test_an_overloaded_owner_yields_to_the_least_loaded() -> None:
    """6 + 3 + 2 = 11: 6 > 5."""
    assert pick({OWNER: 6, OTHERS[0]: 3, OTHERS[1]: 2}) == OTHERS[1]


def test_an_idle_fleet_keeps_to_the_ring() -> None:
    assert pick({}) == OWNER


def test_prompts_with_the_same_256_tokens_go_together() -> None:
    """Blocks of 128: the second block's chained hash names the first 256 tokens, whatever follows."""
    assert pick({}, a_request(block_hashes={128: hashes(7, KEY, 1, 2)})) == OWNER


def test_blocks_larger_than_the_prefix_are_taken_whole() -> None:
    assert pick({}, a_request(block_hashes={512: hashes(KEY, 1)})) == OWNER


def test_a_prompt_without_a_full_block_goes_to_the_least_loaded() -> None:
    assert pick({OWNER: 1, OTHERS[0]: 1}, a_request()) == OTHERS[1]


@pytest.mark.parametrize("left", ["a", "b", "c", "d"])
def test_an_engine_that_leaves_moves_only_its_own_keys(left: str) -> None:
    ring, rest = HashRing(160), [name for name in "abcd" if name != left]
    keys = [number * (2**64 // 200) for number in range(200)]
    before = ["abcd"[ring.owner(key, "abcd")] for key in keys]
    after = [rest[ring.owner(key, rest)] for key in keys]
    assert all(new == old for old, new in zip(before, after, strict=True) if old != left)
    assert {name: before.count(name) > 20 for name in "abcd"} == dict.fromkeys("abcd", True)


def test_a_key_past_the_last_point_belongs_to_the_first() -> None:
    assert HashRing(1).owner(2**64 - 1, ["a"]) == 0


def test_the_ring_is_bounded() -> None:
    ring = HashRing(1)
    for number in range(MAX_ENGINES + 5):
        ring.owner(KEY, [f"e{number}"])
    assert ring.owner(KEY, ["e0", "new"]) in (0, 1)
