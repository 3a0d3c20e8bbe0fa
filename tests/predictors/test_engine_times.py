"""A gateway that starts in front of engines that have worked for a while: what their own account is worth."""

from __future__ import annotations

import random

import numpy as np
import pytest

from adapters.vllm.engine import parse_report
from gateway.core.errors import MalformedEngineData
from gateway.core.types import Engine, Report, Role, StageTimes
from loadtest.engine import Engine as EngineModel
from loadtest.engine_types import EngineRequest, EngineSettings
from loadtest.step_times import LinearStepTimes
from loadtest.vllm_metrics import VllmMetrics
from predictors.engine_times import EngineTimes, MeanGap, MeanPrefill
from predictors.online import COLD_OUTCOMES, Online

BOTH = Engine(id="e0", url="http://e0", role=Role.BOTH, kv_capacity_tokens=1000)
SLOW = LinearStepTimes(fixed_s=0.2, token_s=2e-3, pair_s=0.0, request_s=0.01, kv_token_s=0.0)
"""Ten to twenty times slower than what is believed of an engine nobody knows."""


def report(times: StageTimes | None, *, running: int = 0, usage: float | None = None) -> Report:
    return Report(running, 0, kv_usage_ratio=usage, times=times)


def worked(requests: int) -> bytes:
    """The metrics page of an engine that served so many requests, one after another."""
    engine = EngineModel("e0", EngineSettings(), SLOW)
    metrics, rng, now = VllmMetrics(engine, "m"), random.Random(1), 0.0
    for number in range(requests):
        engine.submit(EngineRequest(f"r{number}", rng.randint(200, 2000), max_tokens=5), now=now)
        while (at := engine.next_step_at()) is not None:
            now = max(now, at)
            metrics.observe(engine.step(now=now))
    return metrics.render()


def test_counters_are_taken_since_the_report_before() -> None:
    times = EngineTimes(max_engines=4)
    times.since_last(BOTH, report(StageTimes(10, 5.0, 1000, 100, 2.0)))
    seen = times.since_last(BOTH, report(StageTimes(12, 9.0, 1600, 110, 3.0), running=3, usage=0.5))
    assert seen == (MeanPrefill(300, 2.0), MeanGap(3, 500, pytest.approx(0.1)))


def test_an_engine_that_started_anew_is_counted_from_nothing() -> None:
    times = EngineTimes(max_engines=4)
    times.since_last(BOTH, report(StageTimes(10, 5.0, 1000, 100, 2.0)))
    assert times.since_last(BOTH, report(StageTimes(1, 3.0, 50, 0, 0.0))) == (MeanPrefill(50, 3.0), None)


def test_an_engine_that_says_nothing_teaches_nothing() -> None:
    assert EngineTimes(max_engines=4).since_last(BOTH, report(None)) == (None, None)


def test_only_so_many_engines_are_remembered() -> None:
    times = EngineTimes(max_engines=1)
    for name in ("a", "b", "a"):
        seen = times.since_last(Engine(id=name, url="", role=Role.BOTH), report(StageTimes(2, 4.0, 200)))
        assert seen[0] == MeanPrefill(100, 2.0)


def test_the_engines_account_replaces_the_guess_before_the_first_outcome() -> None:
    cold, told = Online().start(), Online().start()
    told.observe_report(BOTH, parse_report(worked(40)).report)
    for length in (500, 1000, 2000):
        true_s = SLOW.prefill_s(length, 0)
        guess_s, start_s = (
            estimator.prefill_s(BOTH, prompt_tokens=length, cached_tokens=0) for estimator in (cold, told)
        )
        assert guess_s < true_s / 5
        assert true_s / 2 < start_s < 2 * true_s
    assert told.decode_step_s(BOTH, batch=1, kv_tokens=0) == pytest.approx(SLOW.decode_s(1, 0), rel=0.5)


def test_who_has_seen_outcomes_does_not_go_by_means() -> None:
    estimator = Online().start()
    times = np.cumsum(np.ones(COLD_OUTCOMES + 5))
    for count in times:
        estimator.observe_report(BOTH, report(StageTimes(int(count), 0.5 * count, 1000 * int(count))))
    known_s = estimator.prefill_s(BOTH, prompt_tokens=1000, cached_tokens=0)
    assert known_s == pytest.approx(0.5, rel=0.2)
    estimator.observe_report(BOTH, report(StageTimes(10**6, 10.0**6, 10**6)))
    assert estimator.prefill_s(BOTH, prompt_tokens=1000, cached_tokens=0) == known_s


def test_a_page_without_the_account_is_a_report_without_it() -> None:
    page = b"vllm:num_requests_running 1\nvllm:num_requests_waiting 0\n"
    assert parse_report(page).report.times is None


@pytest.mark.parametrize("value", ["NaN", "-1", "+Inf"])
def test_an_account_that_cannot_be_is_malformed(value: str) -> None:
    name = b"vllm:inter_token_latency_seconds_sum"
    lines = [
        b" ".join([*line.split(b" ")[:-1], value.encode()]) if line.startswith(name) else line
        for line in worked(1).split(b"\n")
    ]
    with pytest.raises(MalformedEngineData, match="inter_token_latency_seconds_sum"):
        parse_report(b"\n".join(lines))
