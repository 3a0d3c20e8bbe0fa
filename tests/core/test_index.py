import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.core.blocks import chain, root
from gateway.core.events import BlocksCleared, BlocksRemoved, BlocksStored, EngineFound, EngineLost, FirstToken, Tier
from gateway.core.index import TIERS, PrefixIndex
from gateway.core.types import Engine, Role

ENGINES = ("a", "b", "c")
HASHES = np.random.default_rng(1).integers(0, 2**64, 24, dtype=np.uint64)
TRACE = Path(__file__).parents[2] / "../shared/traces/conversation_trace.jsonl"


def index_of(*engine_ids, max_blocks=1000):
    index = PrefixIndex(max_blocks=max_blocks)
    for engine_id in engine_ids:
        index.add_engine(engine_id)
    return index


def cached(index, hashes, block_tokens=16):
    match = index.match({block_tokens: hashes})
    return dict(zip(match.engine_ids, match.cached_tokens.tolist(), strict=True))


runs = st.tuples(st.integers(0, 23), st.integers(1, 24)).map(lambda cut: list(range(24))[cut[0] : sum(cut)])
block_lists = runs | st.lists(st.integers(0, 23), max_size=12)
changes = st.tuples(
    st.sampled_from(["store", "store", "store", "remove", "remove", "clear", "lose", "find"]),
    st.sampled_from(ENGINES),
    block_lists,
    st.sampled_from(TIERS),
)


class Model:
    """The index as a dict of sets, for comparison."""

    def __init__(self):
        self.engines, self.held = set(), {}

    def change(self, action, engine, blocks, tier):
        if action in ("clear", "lose"):
            self.held = {b: {h for h in holders if h[0] != engine} for b, holders in self.held.items()}
        for block in blocks:
            if action == "store" and engine in self.engines:
                self.held.setdefault(block, set()).add((engine, tier))
            if action == "remove":
                self.held.get(block, set()).discard((engine, tier))
        self.engines = (self.engines - {engine} if action == "lose" else self.engines) | (
            {engine} if action == "find" else set()
        )

    def tokens(self, blocks, engine, tiers):
        for count, block in enumerate(blocks):
            if not any((engine, tier) in self.held.get(block, ()) for tier in tiers):
                return 16 * count
        return 16 * len(blocks)


def change(index, action, engine, blocks, tier):
    match action:
        case "store":
            index.apply(BlocksStored(engine, 16, HASHES[blocks], tier))
        case "remove":
            index.apply(BlocksRemoved(engine, 16, HASHES[blocks], tier))
        case "clear":
            index.apply(BlocksCleared(engine))
        case "lose":
            index.apply(EngineLost(engine))
        case "find":
            index.apply(EngineFound(Engine(engine, "http://e", Role.BOTH)))


@settings(max_examples=150, deadline=None)
@given(st.lists(changes, min_size=5, max_size=40), st.lists(block_lists, min_size=1, max_size=4))
def test_the_index_agrees_with_a_dict_of_sets_under_any_interleaving(steps, prompts):
    index, model = index_of(), Model()
    for step in [("find", "a", [], Tier.DEVICE), ("find", "b", [], Tier.DEVICE), *steps]:
        change(index, *step)
        model.change(*step)
    assert len(index) == sum(bool(holders) for holders in model.held.values())
    for blocks in [list(range(24)), *prompts]:
        match = index.match({16: HASHES[blocks]})
        assert match.engine_ids == tuple(sorted(model.engines))
        for row, engine in enumerate(match.engine_ids):
            expected = [model.tokens(blocks, engine, TIERS[: last + 1]) for last in range(4)]
            assert match.tokens[row].tolist() == expected
    for engine in ENGINES:
        held = sum(any(holder[0] == engine for holder in holders) for holders in model.held.values())
        assert index.engine_block_count(engine) == held


@settings(deadline=None)
@given(block_lists, st.integers(0, 24))
def test_any_split_of_an_announcement_gives_the_same_index(blocks, cut):
    whole, split = index_of("a"), index_of("a")
    whole.store("a", HASHES[blocks])
    split.store("a", HASHES[blocks[:cut]])
    split.store("a", HASHES[blocks[cut:]])
    assert cached(whole, HASHES) == cached(split, HASHES)
    assert len(whole) == len(split) == len(set(blocks))


def test_nearer_tiers_count_before_farther_ones():
    index = index_of("a", "b")
    index.store("a", HASHES[:4], Tier.DEVICE)
    index.store("a", HASHES[2:10], Tier.HOST)
    index.store("b", HASHES[:12], Tier.REMOTE)
    match = index.match({16: HASHES})
    assert match.tokens.tolist() == [[64, 160, 160, 160], [0, 0, 0, 192]]
    assert match.device_tokens.tolist() == [64, 0]


def test_each_engine_is_matched_at_its_own_block_size():
    index, other = index_of("a", "b"), HASHES ^ np.uint64(1)
    index.store("a", HASHES[:8])
    index.store("b", other[:2])
    match = index.match({16: HASHES, 64: other})
    assert match.cached_tokens.tolist() == [128, 128]
    assert cached(index, HASHES) == {"a": 128, "b": 0}


def test_the_best_engine_holds_the_most_then_the_nearest_then_has_the_lowest_id():
    index = index_of("c", "b", "a", "d")
    assert index.match({16: HASHES}).best is None
    index.store("a", HASHES[:4], Tier.HOST)
    assert index.match({16: HASHES}).best == "a"
    index.store("d", HASHES[:4], Tier.DEVICE)
    index.store("c", HASHES[:4], Tier.DEVICE)
    assert index.match({16: HASHES}).best == "c"
    index.store("b", HASHES[:5], Tier.DISK)
    assert index.match({16: HASHES}).best == "b"


def test_an_index_without_engines_matches_nothing():
    match = index_of().match({16: HASHES})
    assert match.engine_ids == ()
    assert match.tokens.shape == (0, 4)
    assert match.best is None


def test_announcements_of_an_engine_that_left_are_ignored():
    index = index_of("a")
    index.remove_engine("a")
    index.store("a", HASHES)
    index.remove("a", HASHES)
    index.add_engine("a")
    assert cached(index, HASHES) == {"a": 0}


def test_events_that_are_not_about_blocks_change_nothing():
    index = index_of("a")
    index.apply(FirstToken("r"))
    assert cached(index, HASHES) == {"a": 0}


def test_a_thousand_engines_are_matched_at_once():
    index = index_of(*(f"e{n:04}" for n in range(1000)))
    for n in range(0, 1000, 10):
        index.store(f"e{n:04}", HASHES[: n % 24])
    expected = [16 * (n % 24) if n % 10 == 0 else 0 for n in range(1000)]
    assert list(cached(index, HASHES).values()) == expected


def test_a_prompt_longer_than_one_pass_is_matched_to_its_last_block():
    hashes = np.random.default_rng(2).integers(1, 2**64, 20_000, dtype=np.uint64)
    index = index_of("a", "b", max_blocks=20_000)
    index.store("a", hashes)
    index.store("b", hashes[:19_999])
    assert cached(index, hashes, 1) == {"a": 20_000, "b": 19_999}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 400), st.booleans()), max_size=30))
def test_a_full_index_keeps_its_bound_and_never_claims_what_was_not_announced(steps):
    hashes = np.random.default_rng(3).integers(1, 2**64, 500, dtype=np.uint64)
    index, announced = index_of("a", "b", max_blocks=64), {"a": set(), "b": set()}
    for engine, first, is_clear in steps:
        if is_clear:
            index.clear(engine)
            announced[engine].clear()
        else:
            index.store(engine, hashes[first : first + 100])
            announced[engine].update(range(first, first + 100))
        assert len(index) <= 64
    for block in range(0, 500, 7):
        held = cached(index, hashes[block : block + 1])
        assert all(block in announced[engine] for engine, tokens in held.items() if tokens)


def test_a_full_index_drops_what_was_not_used():
    hashes = np.random.default_rng(4).integers(1, 2**64, 20_000, dtype=np.uint64)
    index = index_of("a", max_blocks=4000)
    index.store("a", hashes[:100])
    for first in range(100, 20_000, 100):
        assert cached(index, hashes[:100], 1) == {"a": 100}
        index.store("a", hashes[first : first + 100])
    assert len(index) == 4000
    assert index.evicted_count == 16_000


def test_blocks_of_a_forgotten_engine_make_room_before_blocks_in_use_do():
    hashes = np.random.default_rng(5).integers(1, 2**64, 4000, dtype=np.uint64)
    index = index_of("a", "b", max_blocks=2000)
    index.store("a", hashes[:1000])
    index.store("b", hashes[1000:2000])
    index.clear("b")
    index.store("b", hashes[2000:3000])
    assert cached(index, hashes[:1000], 1) == {"a": 1000, "b": 0}
    assert index.evicted_count == 0


@pytest.mark.slow
@pytest.mark.skipif(not TRACE.exists(), reason=f"no conversation trace at {TRACE}")
def test_the_conversation_trace_hits_as_often_as_counted_from_the_file():
    prompts = [json.loads(line)["hash_ids"] for line in TRACE.read_text().splitlines()]
    index, hit_blocks, seen, counted = index_of("a", max_blocks=400_000), 0, set(), 0
    for prompt in prompts:
        # In the file a block is one number already, which stands for its 512 tokens.
        hashes = chain(root(512), np.array(prompt), 1)
        hit_blocks += cached(index, hashes, 1)["a"]
        index.store("a", hashes)
        counted += sum(block in seen for block in prompt)
        seen.update(prompt)
    assert hit_blocks == counted
    assert hit_blocks / sum(map(len, prompts)) == pytest.approx(0.366, abs=0.0005)
