"""Dynamo's KV router cost."""

import random
from collections import Counter

import numpy as np
import pytest

from gateway.core.types import Role
from gateway.policies.prefix.dynamo_kv import DynamoKv
from gateway.policies.stage import Stage
from tests.builders import a_load, a_pair_table, a_request, chosen

PROMPT = a_request(prompt_tokens=330)
"""21 blocks of 16."""


def prefill_costs(policy: DynamoKv, cached: dict[str, int]) -> list[float]:
    loads = [a_load("p1", Role.PREFILL, queued_tokens=160, own_count=1), a_load("p2", Role.PREFILL)]
    pairs = a_pair_table(loads, [a_load("d1", Role.DECODE)], cached=cached)
    stage = Stage(pairs.prefills, np.array([0, 1]), pairs)
    return list(policy.start(random.Random(0)).prefill_cost(PROMPT, stage))


def test_cached_blocks_are_taken_off_what_is_to_be_computed() -> None:
    """p1: 160 / 16 + 21 - 15 = 16. p2: 0 + 21 - 2 = 19 (40 tokens are 2 full blocks)."""
    assert prefill_costs(DynamoKv(), {"p1": 240, "p2": 40}) == pytest.approx([16, 19])


def test_weights_scale_prefill_credit_and_requests() -> None:
    """p1: 2 x (10 + 21 - 0.5 x 15) + 3 x 1 = 50. p2: 2 x (21 - 0.5 x 2) = 40."""
    policy = DynamoKv(prefill_load_scale=2.0, overlap_credit=0.5, active_request_weight=3.0)
    assert prefill_costs(policy, {"p1": 240, "p2": 40}) == pytest.approx([50, 40])


def test_the_credit_of_a_busy_engine_decays() -> None:
    """p1: d = 1 / (1 + 2.1 x (160 - 0) / 16 / 21) = 1 / 2, so 31 - 7.5 = 23.5; p2 is the least busy: d = 1."""
    assert prefill_costs(DynamoKv(credit_decay=2.1), {"p1": 240, "p2": 40}) == pytest.approx([23.5, 19])


def test_a_credit_beyond_the_work_costs_nothing_below_zero() -> None:
    assert prefill_costs(DynamoKv(overlap_credit=9.0), {"p1": 240, "p2": 320}) == [0, 0]


def test_decode_goes_by_blocks_held_with_the_prompt() -> None:
    """33 tokens are 3 blocks, 47 too, 48 also, 49 are 4; ties are drawn."""
    decodes = [a_load(f"d{tokens}", Role.DECODE, kv_tokens=tokens) for tokens in (33, 48, 49)]
    pairs = a_pair_table([a_load("p1", Role.PREFILL)], decodes)
    chooser = DynamoKv().start(random.Random(1))
    assert {chosen(chooser, PROMPT, pairs)[1] for _ in range(40)} == {"d33", "d48"}


def test_an_engine_that_does_both_pays_for_both() -> None:
    """a: 21 - 15 + (20 + 21) = 47. b: 21 + (0 + 21) = 42."""
    engines = [a_load("a", kv_tokens=320), a_load("b")]
    pairs = a_pair_table(engines, engines, cached={"a": 240})
    stage = Stage(pairs.prefills, np.array([0, 1]), pairs)
    assert list(DynamoKv().start(random.Random(0)).prefill_cost(PROMPT, stage)) == pytest.approx([47, 42])
    assert chosen(DynamoKv().start(random.Random(0)), PROMPT, pairs) == ("b", "b")


def test_a_temperature_draws_by_softmax() -> None:
    """Costs 31 and 21, scaled to 1 and 0, temperature 1: odds 1 : 1/e, so 0.731 for the cheaper."""
    loads = [a_load("p1", Role.PREFILL, queued_tokens=160), a_load("p2", Role.PREFILL)]
    pairs = a_pair_table(loads, [a_load("d1", Role.DECODE)])
    chooser = DynamoKv(temperature=1.0).start(random.Random(1))
    counts = Counter(chosen(chooser, PROMPT, pairs)[0] for _ in range(2000))
    assert counts["p2"] / 2000 == pytest.approx(0.731, abs=0.03)
