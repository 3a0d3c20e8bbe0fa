"""Least predicted work: the pair that is predicted to be done first."""

import random

import pytest

from gateway.policies.least_work import LeastWork
from tests.builders import a_load, a_pair_table, a_request


def test_a_short_answer_is_worth_less_decode_speed() -> None:
    policy = LeastWork(output_tokens=100).start(random.Random(0))
    loads = [a_load("a"), a_load("b")]
    pairs = a_pair_table(loads, loads, prefill_s={"a": 1.0, "b": 2.0}, tbt_s={"a": 0.05, "b": 0.02})
    long_costs = policy.costs(a_request(), pairs, now=0.0)
    short_costs = policy.costs(a_request(max_output_tokens=10), pairs, now=0.0)
    assert list(long_costs) == pytest.approx([6.0, 4.0])
    assert list(short_costs) == pytest.approx([1.5, 2.2])
