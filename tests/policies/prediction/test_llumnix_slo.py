"""Llumnix's SLO routing."""

import random

import numpy as np

from gateway.core.interfaces import PairTable
from gateway.core.types import Role
from gateway.policies.prediction.llumnix_slo import LlumnixSlo
from tests.builders import a_load, a_pair_table, a_request, chosen

POLICY = LlumnixSlo().start(random.Random(0))


def table(ttft_s: dict[str, float], tbt_s: dict[str, float]) -> PairTable:
    prefills = [a_load(name, Role.PREFILL) for name in ttft_s]
    return a_pair_table(prefills, [a_load(name, Role.DECODE) for name in tbt_s], prefill_s=ttft_s, tbt_s=tbt_s)


def test_engines_beyond_85_percent_of_the_slo_are_dropped() -> None:
    """0.85 x 6 s = 5.1 s; 0.85 x 50 ms = 42.5 ms."""
    pairs = table({"p1": 5.2, "p2": 5.0}, {"d1": 0.041, "d2": 0.043})
    costs = POLICY.costs(a_request(), pairs, now=0.0)
    assert list(np.isinf(costs)) == [True, True, False, True]
    assert chosen(POLICY, a_request(), pairs) == ("p2", "d1")


def test_when_all_are_beyond_the_lowest_prediction_is_taken() -> None:
    assert chosen(POLICY, a_request(), table({"p1": 8.0, "p2": 7.0}, {"d1": 0.09, "d2": 0.08})) == ("p2", "d2")
