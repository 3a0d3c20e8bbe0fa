"""Token gaps in a fixed-size histogram against the plain computation."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.gaps import GapHistogram


def histogram(gaps: list[float]) -> GapHistogram:
    result = GapHistogram()
    for gap in gaps:
        result.add(gap)
    return result


def test_without_gaps_there_is_no_mean() -> None:
    assert histogram([]).mean_s is None
    assert histogram([]).slow_mean_s is None


def test_the_slowest_tenth_of_twenty_gaps_is_the_mean_of_the_two_slowest() -> None:
    assert histogram([0.01] * 18 + [0.5, 1.0]).slow_mean_s == pytest.approx(0.75)


def test_tokens_that_arrive_together_are_one_gap_and_zeros() -> None:
    gaps = GapHistogram()
    gaps.add(0.4, count=4)
    assert (gaps.count, gaps.mean_s) == (4, pytest.approx(0.1))
    assert gaps.slow_mean_s == pytest.approx(0.4)


@given(st.lists(st.floats(0, 500), min_size=1, max_size=300))
def test_both_means_are_exact_or_within_a_bucket_of_the_plain_computation(gaps: list[float]) -> None:
    result = histogram(gaps)
    slowest = sorted(gaps)[-max(1, math.ceil(len(gaps) * 0.1)) :]
    assert result.mean_s == pytest.approx(sum(gaps) / len(gaps), abs=1e-9)
    # The last bucket takes all gaps beyond 100 s; below it a bucket's edges are 19 % apart.
    if max(gaps) < 100:
        assert result.slow_mean_s == pytest.approx(sum(slowest) / len(slowest), rel=0.19, abs=1e-4)
