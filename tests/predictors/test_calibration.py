from __future__ import annotations

import math
import random

import pytest

from gateway.core.errors import ConfigError
from gateway.core.types import Role
from predictors.calibration import Calibration, Margins, MarginState


def kept(margins: Margins, rng: random.Random, count: int, *, slowdown: float = 1.0) -> float:
    """Share of `count` outcomes (predicted 1 s) that stayed under the margin in force; short prompts vary twice."""
    hits = 0
    for _ in range(count):
        tokens = int(min(30_000, max(600, rng.lognormvariate(8.5, 1.2))))
        actual_s = slowdown * rng.lognormvariate(0, 0.2 if tokens > 2000 else 0.4)
        hits += actual_s <= margins.upper(Role.PREFILL, tokens, 1.0)
        margins.observe(Role.PREFILL, tokens, predicted_s=1.0, actual_s=actual_s)
    return hits / count


@pytest.mark.parametrize("seed", range(3))
def test_p90_covers_88_to_92_percent_over_a_long_run(seed: int) -> None:
    margins, rng = Calibration().start(), random.Random(seed)
    kept(margins, rng, 200)
    assert 0.88 <= kept(margins, rng, 3000) <= 0.92


@pytest.mark.parametrize("slowdown", [1.5, 2.0, 4.0])
@pytest.mark.parametrize("seed", range(3))
def test_after_a_step_change_40_outcomes_bring_coverage_back_above_85_percent(seed: int, slowdown: float) -> None:
    margins, rng = Calibration().start(), random.Random(seed)
    kept(margins, rng, 600)
    kept(margins, rng, 40, slowdown=slowdown)
    assert kept(margins, rng, 200, slowdown=slowdown) >= 0.85


def test_drift_is_announced_widens_the_margin_and_ends() -> None:
    margins, rng = Calibration().start(), random.Random(1)
    kept(margins, rng, 400)
    calm = margins.factor(Role.PREFILL, 5000)
    assert margins.state(Role.PREFILL) is MarginState.STEADY
    kept(margins, rng, 40, slowdown=3.0)
    assert margins.state(Role.PREFILL) is MarginState.DRIFTING
    assert margins.factor(Role.PREFILL, 5000) > 2 * calm
    kept(margins, rng, 300, slowdown=3.0)
    assert margins.state(Role.PREFILL) is MarginState.STEADY


def test_predictions_that_run_high_are_lowered_in_time() -> None:
    margins, rng = Calibration().start(), random.Random(1)
    kept(margins, rng, 400)
    kept(margins, rng, 400, slowdown=0.25)
    assert margins.factor(Role.PREFILL, 5000) < 0.5


def test_with_nothing_seen_the_margin_is_wide_and_says_cold() -> None:
    margins = Calibration().start()
    assert margins.upper(Role.DECODE, 100, 0.05) == pytest.approx(0.1)
    assert margins.coverage(Role.DECODE).state is MarginState.COLD


def test_a_cold_margin_covers_the_worst_seen_so_far() -> None:
    margins = Calibration().start()
    margins.observe(Role.PREFILL, 100, predicted_s=1.0, actual_s=7.0)
    assert margins.factor(Role.PREFILL, 100) == pytest.approx(7.0)


def test_a_length_never_seen_takes_the_margin_of_its_role() -> None:
    margins = Calibration().start()
    kept(margins, random.Random(1), 300)
    for unseen in (1, 10**6):
        assert margins.factor(Role.PREFILL, unseen) == pytest.approx(1.35, abs=0.15)
    assert margins.state(Role.BOTH) is MarginState.COLD


def test_the_margin_is_the_conformal_quantile_of_the_ratios_seen() -> None:
    margins = Calibration(step=0.0, drift_misses=math.inf).start()
    for number in range(1, 100):
        margins.observe(Role.PREFILL, 1000, predicted_s=2.0, actual_s=2.0 * number)
    # ceil(0.9 x 100) = the 90th of 99 ratios; ceil(0.5 x 100) = the 50th.
    assert margins.factor(Role.PREFILL, 1000) == pytest.approx(90)
    assert margins.factor(Role.PREFILL, 1000, 0.5) == pytest.approx(50)


def test_the_same_outcomes_give_the_same_margins() -> None:
    first, second = Calibration().start(), Calibration().start()
    assert kept(first, random.Random(3), 300) == kept(second, random.Random(3), 300)
    assert first.factor(Role.PREFILL, 900) == second.factor(Role.PREFILL, 900)


@pytest.mark.parametrize(("predicted_s", "actual_s"), [(0.0, 1.0), (1.0, 0.0), (1.0, math.nan), (math.inf, 1.0)])
def test_times_that_cannot_be_are_not_learnt_from(predicted_s: float, actual_s: float) -> None:
    margins = Calibration().start()
    margins.observe(Role.PREFILL, 100, predicted_s=predicted_s, actual_s=actual_s)
    assert margins.coverage(Role.PREFILL).outcome_count == 0


@pytest.mark.parametrize("settings", [{"quantile": 1.0}, {"min_outcomes": 101}, {"cold_factor": 0.5}])
def test_impossible_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="calibration"):
        Calibration(**settings)  # type: ignore[arg-type]


def test_misses_that_come_in_runs_are_no_drift_and_cost_no_coverage() -> None:
    margins, rng, state = Calibration().start(), random.Random(5), 0.0
    under_way: list[tuple[float, float]] = []
    hits = []
    for _ in range(6000):
        # Neighbours share a queue, and are heard of 60 requests later.
        state = 0.95 * state + 0.3 * rng.gauss(0.0, 0.05)
        under_way.append((margins.upper(Role.PREFILL, 1000, 1.0), math.exp(state)))
        if len(under_way) > 60:
            promised_s, actual_s = under_way.pop(0)
            hits.append(actual_s <= promised_s)
            margins.observe(Role.PREFILL, 1000, predicted_s=1.0, actual_s=actual_s, promised_s=promised_s)
    assert 0.88 <= sum(hits[500:]) / len(hits[500:]) <= 0.92


def test_a_promise_is_judged_as_it_was_made() -> None:
    margins = Calibration().start()
    for _ in range(100):
        margins.observe(Role.PREFILL, 1000, predicted_s=1.0, actual_s=1.5, promised_s=1.2)
    assert margins.coverage(Role.PREFILL).kept_ratio == 0.0


def test_drift_that_no_margin_answers_falls_back_to_ignorance() -> None:
    margins, rng = Calibration().start(), random.Random(1)
    kept(margins, rng, 400)
    for number in range(500):
        # A queue that grows faster than word of it comes back: every promise is old when it is judged.
        slow_s = 1.02**number
        margins.observe(Role.PREFILL, 1000, predicted_s=1.0, actual_s=slow_s, promised_s=slow_s / 2)
    assert margins.state(Role.PREFILL) is MarginState.FALLBACK
    assert margins.factor(Role.PREFILL, 1000) >= Calibration().cold_factor
