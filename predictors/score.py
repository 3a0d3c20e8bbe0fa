"""How good predictions were: errors, quantile losses, coverage, and the decisions they got wrong.

An error of 20 % on a time far from its bound costs nothing and one of 2 % at the bound costs a request, so
`wrong_decisions_per_thousand` stands beside the usual measures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gateway.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Score:
    """Measures over one set of predictions; ratios are of the actual time, so 0.1 means 10 %."""

    count: int
    mean_absolute_error_ratio: float
    """MAPE."""
    p50_error_ratio: float
    p95_error_ratio: float
    bias_ratio: float
    """Mean signed error: above 0 when predictions run high."""
    pinball_loss_s: float
    """Mean quantile loss at `quantile`, seconds: what a prediction read as that quantile costs."""
    coverage_ratio: float
    """Share of actual times at or under their prediction: `quantile` when the promise is kept."""
    wrong_decisions_per_thousand: float | None
    """Admissions that then missed their bound and refusals that would have met it; None without bounds."""


def score(
    predicted_s: ArrayLike, actual_s: ArrayLike, *, quantile: float = 0.5, bound_s: ArrayLike | None = None
) -> Score:
    """The measures of predictions against what happened, shapes (n,), n >= 1, actual > 0.

    `bound_s` (a number or shape (n,)) is the SLO each time was held against. ConfigError when shapes or values are off.
    """
    predicted, actual = _times("predicted_s", predicted_s), _times("actual_s", actual_s)
    if predicted.shape != actual.shape:
        raise ConfigError(f"score: {len(predicted)} predictions for {len(actual)} actual times")
    if not 0.0 < quantile < 1.0:
        raise ConfigError(f"score.quantile: must be between 0 and 1, not {quantile}")
    if not (actual > 0).all():
        raise ConfigError("score.actual_s: must be > 0")
    signed = (predicted - actual) / actual
    errors = np.abs(signed)
    return Score(
        count=len(actual),
        mean_absolute_error_ratio=float(errors.mean()),
        p50_error_ratio=float(np.quantile(errors, 0.5)),
        p95_error_ratio=float(np.quantile(errors, 0.95)),
        bias_ratio=float(signed.mean()),
        pinball_loss_s=pinball_loss_s(predicted, actual, quantile=quantile),
        coverage_ratio=float((actual <= predicted).mean()),
        wrong_decisions_per_thousand=None if bound_s is None else _wrong_per_thousand(predicted, actual, bound_s),
    )


def pinball_loss_s(predicted_s: NDArray[np.float64], actual_s: NDArray[np.float64], *, quantile: float) -> float:
    """Mean of q x shortfall where the prediction was low and (1 - q) x excess where it was high, seconds."""
    shortfall = actual_s - predicted_s
    return float(np.maximum(quantile * shortfall, (quantile - 1.0) * shortfall).mean())


def _wrong_per_thousand(predicted: NDArray[np.float64], actual: NDArray[np.float64], bound_s: ArrayLike) -> float:
    bound = np.asarray(bound_s, dtype=float)
    if bound.shape not in ((), actual.shape):
        raise ConfigError(f"score.bound_s: must be one number or {len(actual)} of them")
    return float(1000.0 * ((predicted <= bound) != (actual <= bound)).mean())


def _times(name: str, values: ArrayLike) -> NDArray[np.float64]:
    times = np.asarray(values, dtype=float)
    if times.ndim != 1 or times.size == 0 or not math.isfinite(float(np.abs(times).sum())):
        raise ConfigError(f"score.{name}: must be one or more finite numbers in a row")
    return times
