"""SMG's expected wait."""

import pytest

from gateway.core.interfaces import EngineLoad
from gateway.core.types import Report
from gateway.policies.wait_score import WaitScore, WaitSettings
from tests.builders import a_load, a_request


def a_reporter(engine_id: str, report: Report | None, own_count: int = 0, age_s: float = 1.0) -> EngineLoad:
    return a_load(engine_id, report=report, report_age_s=None if report is None else age_s, own_count=own_count)


def test_the_score_is_tokens_over_speed_plus_kv_pressure() -> None:
    """a: 3000 / 1500 + 0.15 x 0.5/0.5 = 2.15 s. b: 2 waiting x 1024 / 2000 + 0.15 x 0.8/0.2 = 1.024 + 0.6 = 1.624 s."""
    score = WaitScore(WaitSettings())
    a = Report(1, 3, kv_usage_ratio=0.5, waiting_uncached_tokens=3000, gen_tokens_per_s=1500.0)
    b = Report(1, 2, kv_usage_ratio=0.8)
    assert list(score.score([a_reporter("a", a), a_reporter("b", b)], now=10.0)) == pytest.approx([2.15, 1.624])


def test_a_full_engine_has_a_finite_score() -> None:
    """k is capped: 0.15 x 0.999 / 0.001 = 149.85 s."""
    loads = [a_reporter("a", Report(1, 0, kv_usage_ratio=1.0))]
    assert list(WaitScore(WaitSettings()).score(loads, now=10.0)) == pytest.approx([149.85])


def test_what_was_sent_counts_until_the_next_report() -> None:
    """4000 tokens at 2000 per second: 2 s, until a report younger than the one seen at 9.0 comes."""
    score = WaitScore(WaitSettings())
    report = Report(1, 0)
    score.score([a_reporter("a", report)], now=10.0)
    score.sent(a_request(prompt_tokens=4000), ["a"])
    assert score.waiting_count(a_reporter("a", report), now=10.0) == 1
    assert list(score.score([a_reporter("a", report, age_s=2.0)], now=11.0)) == pytest.approx([2.0])
    assert list(score.score([a_reporter("a", report, age_s=0.5)], now=12.0)) == pytest.approx([0.0])


def test_an_engine_without_a_report_is_the_best_peer_plus_its_requests() -> None:
    """Best peer 1 s; 2 requests x 1024 tokens / mean of (1000, 3000) per second = 1.024 s more."""
    peers = [
        a_reporter("a", Report(1, 0, waiting_uncached_tokens=1000, gen_tokens_per_s=1000.0)),
        a_reporter("b", Report(1, 0, waiting_uncached_tokens=9000, gen_tokens_per_s=3000.0)),
    ]
    scores = WaitScore(WaitSettings()).score([*peers, a_reporter("c", None, own_count=2)], now=10.0)
    assert list(scores) == pytest.approx([1.0, 3.0, 2.024])


def test_when_all_are_dark_requests_in_flight_decide() -> None:
    loads = [a_reporter("a", None, own_count=4), a_reporter("b", None, own_count=1)]
    assert list(WaitScore(WaitSettings()).score(loads, now=10.0)) == [4.0, 1.0]


@pytest.mark.parametrize("tokens_per_s", [None, 0.0, 1e-300])
def test_the_throughput_of_an_idle_engine_is_not_its_speed(tokens_per_s: float | None) -> None:
    """1000 / 2000 = 0.5 s."""
    report = Report(0, 1, waiting_uncached_tokens=1000, gen_tokens_per_s=tokens_per_s)
    assert list(WaitScore(WaitSettings()).score([a_reporter("a", report)], now=10.0)) == [0.5]
