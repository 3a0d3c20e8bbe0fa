"""The figures of a run: what counts as attained, and that nothing unknown turns into a number."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.types import Slo
from loadtest.report import Outcome, OutcomeError, Status, is_attained, slowest_tenth_mean_s, summarise

SLO = Slo(ttft_s=1.0, tbt_s=0.1)


def outcome(**changes: Any) -> Outcome:
    values: dict[str, Any] = {"arrived_at": 0.0, "status": Status.OK, "prompt_tokens": 100, "output_tokens": 10}
    values |= {"ttft_s": 0.5, "tbt_s": 0.05, "tpot_s": 0.02, "e2e_s": 2.0}
    return Outcome(**(values | changes))


def refused(**changes: Any) -> Outcome:
    return Outcome(**({"arrived_at": 0.0, "status": Status.REFUSED, "prompt_tokens": 300} | changes))


def test_an_empty_run_has_no_ratios_and_no_latencies() -> None:
    report = summarise([], SLO)
    assert (report.requests, report.goodput_per_s, report.attained_ratio, report.ttft_s.p99) == (0, None, None, None)
    assert "attained  - of requests" in report.to_table()


def test_refused_and_failed_requests_stand_in_every_denominator() -> None:
    report = summarise([outcome(), refused(), refused(status=Status.ERROR, reason="lost")], SLO)
    assert (report.requests, report.ok, report.refused, report.errors) == (3, 1, 1, 1)
    assert report.attained_ratio == pytest.approx(1 / 3)
    assert report.attained_tokens_ratio == pytest.approx(100 / 700)
    assert report.reasons == {"lost": 1}


def test_goodput_counts_attained_requests_over_the_span_from_first_arrival_to_last_end() -> None:
    report = summarise([outcome(arrived_at=10.0), outcome(arrived_at=12.0), outcome(arrived_at=11.0, ttft_s=3.0)], SLO)
    assert report.duration_s == 4.0
    assert report.goodput_per_s == pytest.approx(2 / 4)


def test_a_fixed_window_replaces_the_span() -> None:
    assert summarise([outcome()], SLO, duration_s=8.0).goodput_per_s == pytest.approx(1 / 8)


def test_latencies_are_those_of_answered_requests_only() -> None:
    report = summarise([outcome(ttft_s=t) for t in (0.1, 0.2, 0.3)] + [refused(ttft_s=9.0)], SLO)
    assert (report.ttft_s.count, report.ttft_s.max) == (3, 0.3)
    assert (report.ttft_s.mean, report.ttft_s.p50) == pytest.approx((0.2, 0.2))
    assert report.ttft_s.p90 == pytest.approx(0.28)


@pytest.mark.parametrize(
    ("changes", "slo", "is_met"),
    [
        ({}, SLO, True),
        ({"ttft_s": 1.0, "tbt_s": 0.1}, SLO, True),
        ({"ttft_s": 1.01}, SLO, False),
        ({"tbt_s": 0.11}, SLO, False),
        ({"tbt_s": None}, SLO, True),
        ({"ttft_s": None, "tbt_s": None}, SLO, False),
        ({"ttft_s": None, "tbt_s": None}, Slo(tbt_s=0.1), False),
        ({"e2e_s": 2.5}, Slo(deadline_s=2.0), False),
        ({"e2e_s": None}, Slo(deadline_s=2.0), False),
        ({"status": Status.ERROR}, Slo(), False),
        ({"ttft_s": None, "tbt_s": None, "e2e_s": None}, Slo(), True),
    ],
)
def test_attained_means_answered_within_every_bound_that_was_seen(
    changes: dict[str, Any], slo: Slo, is_met: bool
) -> None:
    assert is_attained(outcome(**changes), slo) is is_met


@pytest.mark.parametrize(
    ("gaps_s", "expected"),
    [([], None), ([0.3], 0.3), ([0.1] * 9 + [0.5], 0.5), ([0.1] * 9 + [0.5, 0.7], 0.6), (list(range(100)), 94.5)],
)
def test_tbt_is_the_mean_of_the_longest_tenth_of_gaps(gaps_s: list[float], expected: float | None) -> None:
    assert slowest_tenth_mean_s(gaps_s) == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(
    "changes", [{"ttft_s": float("nan")}, {"tbt_s": -0.1}, {"arrived_at": float("inf")}, {"prompt_tokens": -1}]
)
def test_an_impossible_value_is_an_error(changes: dict[str, float]) -> None:
    with pytest.raises(OutcomeError, match=next(iter(changes))):
        outcome(**changes)


seconds = st.one_of(st.none(), st.floats(0, 1e6))
outcomes = st.builds(
    Outcome,
    arrived_at=st.floats(-1e6, 1e6),
    status=st.sampled_from(Status),
    prompt_tokens=st.integers(0, 1 << 20),
    output_tokens=st.integers(0, 1 << 20),
    ttft_s=seconds,
    tbt_s=seconds,
    tpot_s=seconds,
    e2e_s=seconds,
    reason=st.sampled_from(["", "lost", "http_429"]),
)


@given(st.lists(outcomes, max_size=20), st.builds(Slo, ttft_s=seconds, tbt_s=seconds, deadline_s=seconds))
def test_any_run_gives_json_without_nan_ratios_in_range_and_counts_that_add_up(seen: list[Outcome], slo: Slo) -> None:
    report = summarise(seen, slo)
    assert json.loads(report.to_json(), parse_constant=pytest.fail)["requests"] == len(seen)
    assert report.ok + report.refused + report.errors == len(seen)
    assert 0 <= report.attained <= report.ok
    assert report.attained_ratio is None or 0 <= report.attained_ratio <= 1


def test_the_table_keeps_its_columns_apart_when_numbers_are_long() -> None:
    rows = summarise([outcome(ttft_s=1e9)], SLO).to_table().split("\n\n")[1].splitlines()
    assert rows[0].split() == ["ms", "count", "mean", "p50", "p90", "p99", "max"]
    assert rows[1].split() == ["TTFT", "1", *["1000000000000.0"] * 5]
