"""SGLang's classic cache-aware routing."""

import random

from gateway.core.interfaces import PairTable
from gateway.core.types import Role
from gateway.policies.prefix.sglang_cache_aware import SglangCacheAware, SglangCacheAwareChooser
from tests.builders import a_dispatch, a_load, a_pair_table, a_request, chosen, hashes

PROMPT = a_request(prompt_tokens=160, block_hashes={16: hashes(*range(1, 11))})


def table(**counts: int) -> PairTable:
    engines = [a_load(engine_id, own_count=count) for engine_id, count in counts.items()]
    return a_pair_table(engines, engines)


def after_sending(*prompts: tuple[str, int], policy: SglangCacheAware | None = None) -> SglangCacheAwareChooser:
    """A chooser that sent to each engine the first so many blocks of PROMPT."""
    chooser = (policy or SglangCacheAware()).start(random.Random(0))
    for engine_id, block_count in prompts:
        request = a_request(block_hashes={16: hashes(*range(1, block_count + 1))})
        chooser.dispatched(request, a_dispatch(prefill=engine_id, decode=engine_id), now=0.0)
    return chooser


def test_a_match_over_the_threshold_wins() -> None:
    """4 of 10 blocks: 64 / 160 = 0.4 > 0.3."""
    assert chosen(after_sending(("b", 4)), PROMPT, table(a=0, b=64)) == ("b", "b")


def test_a_match_at_the_threshold_does_not_count() -> None:
    """3 of 10 blocks: 48 / 160 = 0.3."""
    assert chosen(after_sending(("b", 3)), PROMPT, table(a=0, b=1)) == ("a", "a")


def test_imbalance_needs_both_thresholds() -> None:
    """65 - 0 > 64 and 65 > 0: imbalanced. 265 - 200 > 64 but 265 <= 300: balanced."""
    assert chosen(after_sending(("b", 10)), PROMPT, table(a=0, b=65)) == ("a", "a")
    assert chosen(after_sending(("b", 10)), PROMPT, table(a=200, b=265)) == ("b", "b")


def test_of_equal_matches_the_less_loaded_wins() -> None:
    assert chosen(after_sending(("a", 10), ("b", 10), ("c", 9)), PROMPT, table(a=2, b=1, c=0)) == ("b", "b")


def test_the_tree_is_bounded_per_engine() -> None:
    """Room for 64 tokens is room for 4 blocks: 64 / 160 still counts, of two prompts only the newer."""
    policy = SglangCacheAware(max_tree_tokens=64)
    assert chosen(after_sending(("b", 10), policy=policy), PROMPT, table(a=0, b=9)) == ("b", "b")
    chooser = after_sending(("b", 10), policy=policy)
    other = a_request(block_hashes={16: hashes(91, 92, 93, 94)})
    chooser.dispatched(other, a_dispatch(prefill="b", decode="b"), now=1.0)
    assert chosen(chooser, PROMPT, table(a=0, b=9)) == ("a", "a")


def test_decode_follows_its_own_tree_or_the_counts() -> None:
    prefills = [a_load("p1", Role.PREFILL)]
    pairs = a_pair_table(prefills, [a_load("d1", Role.DECODE), a_load("d2", Role.DECODE, own_count=1)])
    for is_decode_cache_aware, expected in ((True, "d2"), (False, "d1")):
        chooser = SglangCacheAware(is_decode_cache_aware=is_decode_cache_aware).start(random.Random(0))
        chooser.dispatched(PROMPT, a_dispatch(prefill="p1", decode="d2"), now=0.0)
        assert chosen(chooser, PROMPT, pairs) == ("p1", expected)
