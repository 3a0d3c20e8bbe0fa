"""One engine's times learnt from outcomes: a non-negative linear model under a fast multiplicative correction.

    seconds = scale x (theta . features),  theta >= 0, scale > 0

Two speeds, because two things change. What a token costs relative to a prompt or a sequence hardly ever does: `theta`
is a regression over some hundred outcomes. How fast the engine runs right now does (throttling, a noisy neighbour):
`scale` follows the last few. Features that grow with the load together with coefficients that cannot be negative make
every prediction monotone, whatever was observed.

Outliers are pulled in to a few times the usual error before they count (Huber). A step change looks like outliers that
all lie on one side, so agreement of recent errors (the Trigg and Leach tracking signal: mean error / mean absolute
error) raises both the limit and the gain.
Source: D. W. Trigg and A. G. Leach, Exponential smoothing with an adaptive response rate, 1967, for the signal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

MIN_S = 1e-6
"""Nothing takes less: predictions stay positive even when every coefficient is learnt to be zero."""
MAX_S = 1e6
"""Eleven days; longer outcomes are a broken clock, not a time."""
USUAL_ERRORS = 3.0
"""An error of more usual errors than this is pulled in."""
CALM_GAIN, ALARMED_GAIN = 0.05, 0.5
SIGNAL_MEMORY = 0.8
ERROR_BOUNDS = (0.02, 3.0)
"""Bounds of the usual error (of the log): at 2 % a perfect engine still passes, at 3 anything does."""
MAX_LOG_SCALE = math.log(1000.0)
MAX_ROW = 1e4
"""Longer rows (absurdly many tokens in no time) are scaled down, or the sums would lose the prior to rounding."""
EXACT_REFITS, REFIT_EVERY = 64, 8
"""The regression is solved for each of the first outcomes, then for every eighth: by then one changes little."""

Features = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Prior:
    """What is believed before the first outcome: a mean per coefficient, and how far off it may well be."""

    mean: Features
    spread: Features


class Learner:
    """Predicts seconds from features and learns from what it really took. Memory is constant."""

    __slots__ = (
        "_error",
        "_features_seconds",
        "_log_scale",
        "_moments",
        "_prior",
        "_signal",
        "_theta",
        "_window",
        "count",
    )

    def __init__(self, prior: Prior, *, window_outcomes: int = 200) -> None:
        size = len(prior.mean)
        self.count = 0
        """Outcomes learnt from."""
        self._prior = prior
        self._window = window_outcomes
        self._theta = prior.mean
        self._moments = np.zeros((size, size))
        self._features_seconds = np.zeros(size)
        self._log_scale = 0.0
        self._error = ERROR_BOUNDS[1]
        self._signal = (0.0, 0.0)

    def heir(self) -> Learner:
        """A learner that believes the same and is easily persuaded otherwise: the start of a sibling engine."""
        child = Learner(self._prior, window_outcomes=self._window)
        child._theta, child._log_scale = self._theta, self._log_scale
        weight = min(1.0, 8.0 / max(self.count, 1))
        child._moments, child._features_seconds = self._moments * weight, self._features_seconds * weight
        child._error = min(ERROR_BOUNDS[1], 4.0 * self._error)
        return child

    def coefficients(self) -> Features:
        """The coefficients in force, scale included, each >= 0."""
        scale = math.exp(self._log_scale)
        return tuple(scale * value for value in self._theta)

    def predict(self, features: Features) -> float:
        """Seconds, MIN_S <= s; never less when a feature grows."""
        return max(MIN_S, math.exp(self._log_scale) * self._shape(features))

    def observe(self, features: Features, seconds: float, *, weight: float = 1.0) -> None:
        """Learns that `features` took `seconds`; 0 < weight <= 1 says how much of that is certain.

        A time that is not positive and finite says nothing and is not counted.
        """
        if not 0.0 < seconds <= MAX_S:
            return
        predicted = self.predict(features)
        believed = predicted * math.exp(self._pull_in(math.log(max(seconds, MIN_S) / predicted)))
        self._remember(features, believed, weight)
        if self.count <= EXACT_REFITS or self.count % REFIT_EVERY == 0:
            self._refit()
        self._follow(math.log(believed / max(MIN_S, self._shape(features))))

    def _shape(self, features: Features) -> float:
        return sum(value * feature for value, feature in zip(self._theta, features, strict=True))

    def _agreement(self) -> float:
        mean, mean_absolute = self._signal
        return (mean / mean_absolute) ** 4 if mean_absolute > 0 else 0.0

    def _pull_in(self, error: float) -> float:
        """The error as far as it is believed; updates what errors are usual and whether they agree."""
        limit = USUAL_ERRORS * self._error * (1.0 + USUAL_ERRORS * self._agreement())
        pulled = max(-limit, min(limit, error))
        mean, mean_absolute = self._signal
        self._signal = (
            SIGNAL_MEMORY * mean + (1.0 - SIGNAL_MEMORY) * pulled,
            SIGNAL_MEMORY * mean_absolute + (1.0 - SIGNAL_MEMORY) * abs(pulled),
        )
        # Steps up and down by the same factor: settles where half of the errors are larger, so it is their median.
        step = 0.1 if abs(error) > self._error else -0.1
        self._error = max(ERROR_BOUNDS[0], min(ERROR_BOUNDS[1], self._error * math.exp(step)))
        return pulled

    def _remember(self, features: Features, seconds: float, weight: float) -> None:
        """Adds one equation `theta . features / seconds = 1` (relative errors) to the fading sums."""
        row = np.array(features) * self._prior.spread / seconds
        weight *= min(1.0, MAX_ROW / float(np.linalg.norm(row))) ** 2
        keep = 1.0 - 1.0 / self._window
        self._moments = keep * self._moments + weight * np.outer(row, row)
        self._features_seconds = keep * self._features_seconds + weight * row
        self.count += 1

    def _refit(self) -> None:
        """The coefficients that fit the sums and the prior best, none of them negative."""
        spread = np.array(self._prior.spread)
        matrix = self._moments + np.eye(len(spread))
        scaled = solve_nonnegative(matrix, self._features_seconds + np.array(self._prior.mean) / spread)
        self._theta = tuple(float(value) for value in scaled * spread)

    def _follow(self, log_ratio: float) -> None:
        gain = CALM_GAIN + (ALARMED_GAIN - CALM_GAIN) * self._agreement()
        moved = self._log_scale + gain * (log_ratio - self._log_scale)
        self._log_scale = max(-MAX_LOG_SCALE, min(MAX_LOG_SCALE, moved))


def solve_nonnegative(matrix: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """The x >= 0 that minimises x.matrix.x / 2 - right.x; `matrix` is positive definite and a few columns wide."""
    best, best_value = np.zeros(len(right)), 0.0
    for chosen in _subsets(len(right)):
        part = np.linalg.solve(matrix[np.ix_(chosen, chosen)], right[chosen])
        if (part < 0).any():
            continue
        value = -0.5 * float(right[chosen] @ part)
        if value < best_value:
            best, best_value = np.zeros(len(right)), value
            best[chosen] = part
        if len(chosen) == len(right):
            break
    return best


def _subsets(size: int) -> Iterator[list[int]]:
    """All non-empty subsets, the full one first: when it is feasible nothing beats it."""
    for count in range(size, 0, -1):
        for chosen in combinations(range(size), count):
            yield list(chosen)
