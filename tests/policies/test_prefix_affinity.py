"""Prefix affinity: the longest match unless it is too slow."""

import random

from gateway.core.interfaces import PairTable
from gateway.core.types import Role
from gateway.policies.prefix_affinity import PrefixAffinity
from tests.builders import a_load, a_pair_table, a_request, chosen

POLICY = PrefixAffinity(max_ttft_ratio=1.5).start(random.Random(0))


def table(holder_wait_s: float, **cached: int) -> PairTable:
    """p1 holds the prefix and waits; p2 computes everything in 1 s."""
    prefills = [a_load("p1", Role.PREFILL), a_load("p2", Role.PREFILL)]
    decodes = [a_load("d1", Role.DECODE), a_load("d2", Role.DECODE)]
    seconds = {"wait_s": {"p1": holder_wait_s}, "prefill_s": {"p1": 0.25, "p2": 1.0}, "tbt_s": {"d1": 0.06, "d2": 0.04}}
    return a_pair_table(prefills, decodes, cached=cached, **seconds)


def test_the_holder_wins_up_to_the_factor() -> None:
    """0.25 + 1.25 = 1.5 s is exactly 1.5 times the best."""
    assert chosen(POLICY, a_request(), table(1.25, p1=80)) == ("p1", "d2")


def test_past_the_factor_the_fastest_wins() -> None:
    assert chosen(POLICY, a_request(), table(1.26, p1=80)) == ("p2", "d2")


def test_with_equal_matches_the_fastest_wins() -> None:
    assert chosen(POLICY, a_request(), table(1.0, p1=80, p2=80)) == ("p2", "d2")
    assert chosen(POLICY, a_request(), table(0.5)) == ("p1", "d2")
