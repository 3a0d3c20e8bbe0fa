"""One stage after the other: costs of pairs from two rules."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.interfaces import PairTable
from gateway.core.types import Role
from gateway.policies.stage import (
    Costs,
    Stage,
    decode_then_prefill,
    fewest_in_flight,
    lexicographic,
    prefill_then_decode,
)
from tests.builders import a_load, a_pair_table, pair_at, rows_of

costs_of_four = st.lists(st.sampled_from([0.0, 0.5, 1.0, float("inf")]), min_size=4, max_size=4).filter(
    lambda costs: min(costs) < float("inf")
)


def a_square(count: int) -> PairTable:
    prefills = [a_load(f"p{number}", Role.PREFILL) for number in range(count)]
    return a_pair_table(prefills, [a_load(f"d{number}", Role.DECODE) for number in range(count)])


@given(costs_of_four, costs_of_four)
def test_the_lowest_pair_is_the_first_lowest_of_each_rule(
    prefill_costs: list[float], decode_costs: list[float]
) -> None:
    pairs = a_square(4)
    rules = (lambda stage: np.array(prefill_costs), lambda stage: np.array(decode_costs))
    expected = f"p{int(np.argmin(prefill_costs))}", f"d{int(np.argmin(decode_costs))}"
    assert pair_at(pairs, int(np.argmin(prefill_then_decode(pairs, *rules)))) == expected
    assert pair_at(pairs, int(np.argmin(decode_then_prefill(pairs, *reversed(rules))))) == expected


def test_the_second_rule_sees_only_partners_of_the_first_choice() -> None:
    pools = {"p0": "a", "p1": "b", "d0": "a", "d1": "b"}
    pairs = a_square(2)
    same_pool = [row for row in range(4) if pools[pair_at(pairs, row)[0]] == pools[pair_at(pairs, row)[1]]]
    seen: list[list[str]] = []

    def second(stage: Stage) -> Costs:
        seen.append(stage.engine_ids)
        return np.zeros(len(stage))

    two_pools = rows_of(pairs, same_pool)
    costs = prefill_then_decode(two_pools, lambda stage: np.array([2.0, 1.0]), second)
    assert seen == [["d1"]]
    assert pair_at(two_pools, int(np.argmin(costs))) == ("p1", "d1")
    assert np.isfinite(costs).all()


def test_a_stage_has_the_columns_of_its_candidates() -> None:
    pairs = a_pair_table(
        [a_load("p0", Role.PREFILL, own_count=3), a_load("p1", Role.PREFILL)],
        [a_load("d0", Role.DECODE)],
        cached={"p1": 64},
        wait_s={"p0": 1.0},
        prefill_s={"p0": 0.5, "p1": 0.25},
    )
    stages: list[Stage] = []
    prefill_then_decode(pairs, lambda stage: stages.append(stage) or np.zeros(len(stage)), fewest_in_flight)
    (stage,) = stages
    assert list(stage.own_counts) == [3, 0]
    assert list(stage.held_tokens) == [0, 64]
    assert list(stage.compute_s) == [1.5, 0.25]
    assert not stage.does_both.any()


def test_rows_that_fetch_are_never_chosen() -> None:
    pairs = a_square(1)
    twice = rows_of(pairs, [0, 0], fetch_row=[0, -1])
    assert list(prefill_then_decode(twice, fewest_in_flight, fewest_in_flight)) == [float("inf"), 0.0]


def test_lexicographic_ranks_by_the_first_key_then_the_next_then_position() -> None:
    assert list(lexicographic(np.array([1, 0, 1, 1]), np.array([5.0, 9.0, 4.0, 5.0]))) == [2, 0, 1, 3]
