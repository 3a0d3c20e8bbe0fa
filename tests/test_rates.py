from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.rates import Bucket


def test_a_full_bucket_gives_a_burst_and_then_its_rate() -> None:
    bucket = Bucket(2.0, burst_s=2.0)
    for _ in range(4):
        assert bucket.wait_s(1, now=0.0) == 0.0
        bucket.take(1, now=0.0)
    assert bucket.wait_s(1, now=0.0) == 0.5
    assert bucket.wait_s(1, now=0.5) == 0.0


def test_a_cost_above_all_it_holds_is_let_in_when_it_is_full_and_paid_off() -> None:
    bucket = Bucket(10.0, burst_s=1.0)
    assert bucket.wait_s(100, now=0.0) == 0.0
    bucket.take(100, now=0.0)
    assert bucket.wait_s(1, now=0.0) == pytest.approx(9.1)
    assert bucket.wait_s(1, now=9.1) == pytest.approx(0.0)


def test_a_rate_below_one_in_its_burst_lets_one_in_all_the_same() -> None:
    assert Bucket(0.01, burst_s=1.0).wait_s(1, now=0.0) == 0.0


def test_a_clock_that_goes_back_gives_nothing_away() -> None:
    bucket = Bucket(1.0, burst_s=1.0)
    bucket.take(1, now=100.0)
    assert bucket.wait_s(1, now=50.0) == 1.0
    assert bucket.wait_s(1, now=50.5) == 0.5


@given(st.lists(st.tuples(st.floats(0, 3), st.floats(0.1, 8)), max_size=100))
def test_over_any_time_no_more_is_let_in_than_the_rate_and_one_burst(steps: list[tuple[float, float]]) -> None:
    bucket, now, used, largest = Bucket(2.0, burst_s=3.0), 0.0, 0.0, 0.0
    for elapsed_s, cost in steps:
        now += elapsed_s
        if bucket.wait_s(cost, now=now) == 0:
            bucket.take(cost, now=now)
            used += cost
            largest = max(largest, cost)
        assert used <= 2.0 * now + 6.0 + largest + 1e-6
