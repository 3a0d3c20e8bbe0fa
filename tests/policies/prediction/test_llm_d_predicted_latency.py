"""llm-d's latency scorer, its tiers and its draw."""

import random
from collections import Counter

import numpy as np
import pytest

from gateway.core.types import Role, Slo
from gateway.policies.prediction.llm_d_predicted_latency import LlmDPredictedLatency, Packing
from tests.builders import a_dispatch, a_load, a_pair_table, a_request, chosen, hashes


def scores(
    ttft: list[float], tpot: list[float], idle: list[bool] | None = None, packing: Packing = Packing.LEAST
) -> list[float]:
    policy = LlmDPredictedLatency(packing=packing)
    is_idle = np.array(idle or [False] * len(ttft))
    return list(policy.scores(np.array(ttft), np.array(tpot), is_idle))


def test_least_headroom_scores_highest() -> None:
    """n_ttft 0, 0.5, 1; n_tpot 1, 0, 0.5; c = 0.8 n_ttft + 0.2 n_tpot = 0.2, 0.4, 0.9; int(100 (1 - c)) + 1."""
    assert scores([1.0, 2.0, 3.0], [0.03, 0.01, 0.02]) == pytest.approx([0.81, 0.61, 0.11], abs=0.0101)


def test_most_headroom_scores_highest_when_asked() -> None:
    """int(100 c) + 1."""
    found = scores([1.0, 2.0, 3.0], [0.03, 0.01, 0.02], packing=Packing.MOST)
    assert found == pytest.approx([0.21, 0.41, 0.91], abs=0.0101)


def test_a_bound_that_does_not_differ_has_no_weight() -> None:
    """TTFT alone: c = 0 and 1. Neither differs: c = 0.5 everywhere."""
    assert scores([1.0, 3.0], [0.01, 0.01]) == [1.01, 0.01]
    assert scores([2.0, 2.0], [0.01, 0.03]) == [1.01, 0.01]
    assert scores([2.0, 2.0], [0.01, 0.01]) == [0.51, 0.51]


def test_engines_that_miss_score_zero_beside_one_that_meets() -> None:
    assert scores([1.0, -0.1, 0.5], [0.01, 0.01, -0.001]) == [0.51, 0.0, 0.0]


@pytest.mark.parametrize(
    ("ttft", "tpot", "idle", "group"),
    [
        ([-2.0, -1.0, 5.0], [-0.1, 0.1, -0.1], [True, False, False], [True, False, False]),
        ([-2.0, -1.0, 5.0], [-0.1, 0.1, -0.1], [False] * 3, [False, False, True]),
        ([-2.0, -1.0, -5.0], [-0.1, 0.1, -0.1], [False] * 3, [False, True, False]),
        ([-2.0, -1.0], [-0.1, -0.1], [False] * 2, [True, True]),
    ],
    ids=["idle", "misses only TPOT", "misses only TTFT", "misses both"],
)
def test_when_all_miss_the_mildest_group_is_looked_at(
    ttft: list[float], tpot: list[float], idle: list[bool], group: list[bool]
) -> None:
    assert [score > 0 for score in scores(ttft, tpot, idle)] == group


def test_of_those_that_miss_the_smaller_miss_scores_higher_whatever_the_packing() -> None:
    assert scores([-3.0, -1.0], [-0.1, -0.1], packing=Packing.MOST) == [0.01, 1.01]


def picks(count: int, **slo: float) -> Counter[tuple[str, str]]:
    """Prefill takes 1 s on p1 and 2 s on p2, a step 40 ms on d1 and 60 ms on d2."""
    pairs = a_pair_table(
        [a_load("p1", Role.PREFILL, own_count=1), a_load("p2", Role.PREFILL, own_count=1)],
        [a_load("d1", Role.DECODE, own_count=1), a_load("d2", Role.DECODE, own_count=1)],
        prefill_s={"p1": 1.0, "p2": 2.0},
        tbt_s={"d1": 0.04, "d2": 0.06},
    )
    chooser = LlmDPredictedLatency().start(random.Random(1))
    return Counter(chosen(chooser, a_request(slo=Slo(**slo)), pairs) for _ in range(count))


def test_engines_that_miss_the_slo_are_explored_once_in_a_hundred() -> None:
    """Only p1 and d1 meet 1.5 s and 50 ms: each stage explores with 0.01, so both at once meet with 0.98."""
    counts = picks(2000, ttft_s=1.5, tbt_s=0.05)
    assert counts["p1", "d1"] / 2000 == pytest.approx(0.98, abs=0.01)
    assert 0 < counts["p2", "d1"] + counts["p1", "d2"] < 80


def test_the_draw_is_weighted_by_the_scores() -> None:
    """Both meet 3 s and 70 ms. Headroom p1 2 s, p2 1 s: scores 0.01 and 1.01; d1 30 ms, d2 10 ms likewise."""
    counts = picks(2000, ttft_s=3.0, tbt_s=0.07)
    assert counts["p2", "d2"] / 2000 == pytest.approx((1.01 / 1.02) ** 2, abs=0.01)


def test_one_bound_alone_makes_every_engine_miss() -> None:
    """TPOT headroom is then 0 - 40 ms and 0 - 60 ms: d1 misses by less, 1.01 to 0.01."""
    assert picks(500, ttft_s=3.0)["p2", "d1"] > 450


def test_an_engine_that_holds_the_prefix_keeps_the_request() -> None:
    prefills = [a_load("p1", Role.PREFILL), a_load("p2", Role.PREFILL)]
    pairs = a_pair_table(prefills, [a_load("d1", Role.DECODE)], prefill_s={"p1": 1.0, "p2": 2.0})
    request = a_request(slo=Slo(1.5, 0.1), block_hashes={64: hashes(1, 2)})
    chooser = LlmDPredictedLatency().start(random.Random(1))
    chooser.dispatched(request, a_dispatch(prefill="p2", decode="d1"), now=0.0)
    assert {chosen(chooser, request, pairs)[0] for _ in range(50)} == {"p2"}
