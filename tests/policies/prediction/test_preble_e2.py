"""Preble's exploit or explore."""

import random

from gateway.core.interfaces import PairTable
from gateway.core.types import Role
from gateway.policies.prediction.preble_e2 import MAX_REMEMBERED, PrebleE2, PrebleE2Chooser
from tests.builders import a_dispatch, a_load, a_pair_table, a_request, chosen, hashes


def a_prompt(block_count: int, common_count: int = 0) -> object:
    """So many blocks of 16 tokens, the first of them common to all such prompts."""
    own = range(1000, 1000 + block_count - common_count)
    return a_request(prompt_tokens=16 * block_count, block_hashes={16: hashes(*range(common_count), *own)})


def disaggregated() -> PairTable:
    prefills = [a_load(name, Role.PREFILL) for name in ("p1", "p2", "p3")]
    return a_pair_table(prefills, [a_load("d1", Role.DECODE, own_count=1), a_load("d2", Role.DECODE)])


def after_sending(*sent: tuple[str, int, float], policy: PrebleE2 | None = None) -> PrebleE2Chooser:
    """A chooser that sent so many common blocks to each engine, for so many predicted seconds, at time 0."""
    chooser = (policy or PrebleE2()).start(random.Random(0))
    for engine_id, common_count, prefill_s in sent:
        dispatch = a_dispatch(prefill=engine_id, decode="d1", prefill_s=prefill_s)
        chooser.dispatched(a_prompt(common_count, common_count), dispatch, now=0.0)
    return chooser


def test_more_cached_than_new_exploits_the_least_loaded_holder() -> None:
    """6 of 10 blocks are cached at p1 and p2, 4 are new. p2 carries 1.2 s, p1 1.4 s, p3 1.0 s: 1.4 <= 1.5 x 1.0."""
    chooser = after_sending(("p1", 6, 1.4), ("p2", 6, 1.2), ("p3", 1, 1.0))
    assert chosen(chooser, a_prompt(10, 6), disaggregated()) == ("p2", "d2")


def test_half_new_explores_all() -> None:
    """5 of 10 blocks are cached: 5 new are not fewer."""
    chooser = after_sending(("p1", 5, 1.4), ("p2", 5, 1.2), ("p3", 1, 1.0))
    assert chosen(chooser, a_prompt(10, 5), disaggregated()) == ("p3", "d2")


def test_hits_of_a_hot_engine_go_to_the_least_loaded_one() -> None:
    """p1 carries 1.6 s, over 1.5 x 1.0."""
    chooser = after_sending(("p1", 9, 1.6), ("p2", 1, 1.1), ("p3", 1, 1.0))
    assert chosen(chooser, a_prompt(10, 9), disaggregated()) == ("p3", "d2")


def test_load_is_forgotten_after_three_minutes() -> None:
    chooser = after_sending(("p1", 1, 9.0), ("p3", 1, 9.0))
    assert chosen(chooser, a_prompt(10), disaggregated(), now=180.0) == ("p2", "d2")
    assert chosen(chooser, a_prompt(10), disaggregated(), now=180.1) == ("p1", "d2")


def test_engines_that_decode_also_carry_their_answers() -> None:
    """a: 1.0 s of prefill + 1 request x 343 x 0.01 s = 4.43 s; b: 4 s of prefill."""
    engines = [a_load("a", own_count=1), a_load("b")]
    pairs = a_pair_table(engines, engines, tbt_s={"a": 0.01, "b": 0.01})
    assert chosen(after_sending(("a", 1, 1.0), ("b", 1, 4.0)), a_prompt(10), pairs) == ("b", "b")


def test_the_window_is_bounded() -> None:
    chooser = after_sending(("p1", 0, 2.0), *[("p2", 0, 1e-6)] * MAX_REMEMBERED)
    assert chosen(chooser, a_prompt(10), disaggregated()) == ("p1", "d2")
