from __future__ import annotations

import math

import numpy as np
import pytest

from gateway.core.errors import ConfigError
from predictors.score import pinball_loss_s, score


def test_measures_are_those_worked_by_hand() -> None:
    result = score([1.0, 2.0, 6.0], [2.0, 2.0, 4.0], quantile=0.9)
    assert result.count == 3
    assert result.mean_absolute_error_ratio == pytest.approx((0.5 + 0 + 0.5) / 3)
    assert result.p50_error_ratio == pytest.approx(0.5)
    assert result.p95_error_ratio == pytest.approx(0.5)
    assert result.bias_ratio == pytest.approx(0.0)
    assert result.coverage_ratio == pytest.approx(2 / 3)
    assert result.pinball_loss_s == pytest.approx((0.9 * 1 + 0 + 0.1 * 2) / 3)
    assert result.wrong_decisions_per_thousand is None


def test_only_errors_across_the_bound_are_wrong_decisions() -> None:
    result = score([9.0, 11.0, 1.0, 9.9], [11.0, 9.0, 8.0, 10.0], bound_s=10.0)
    assert result.wrong_decisions_per_thousand == 500.0


def test_each_time_can_be_held_against_a_bound_of_its_own() -> None:
    assert score([1.0, 1.0], [2.0, 2.0], bound_s=[1.5, 3.0]).wrong_decisions_per_thousand == 500.0


def test_the_quantile_minimises_its_pinball_loss() -> None:
    actual = np.arange(1.0, 101.0)
    losses = {level: pinball_loss_s(np.full(100, level), actual, quantile=0.9) for level in (70.0, 90.0, 99.0)}
    assert min(losses, key=losses.__getitem__) == 90.0


@pytest.mark.parametrize(
    ("predicted", "actual", "settings"),
    [
        ([], [], {}),
        ([1.0], [1.0, 2.0], {}),
        ([1.0], [0.0], {}),
        ([math.nan], [1.0], {}),
        ([1.0], [1.0], {"quantile": 1.0}),
        ([1.0, 1.0], [1.0, 1.0], {"bound_s": [1.0, 2.0, 3.0]}),
    ],
)
def test_what_cannot_be_scored_is_refused(
    predicted: list[float], actual: list[float], settings: dict[str, object]
) -> None:
    with pytest.raises(ConfigError, match="score"):
        score(predicted, actual, **settings)  # type: ignore[arg-type]
