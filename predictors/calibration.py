"""Margins that keep a stated coverage: the factor by which a prediction is raised to become a quantile.

Conformal prediction, online. Per role and length bucket the log ratios actual / predicted of the last outcomes are
kept, and the q-quantile of them is the margin; that holds its promise while outcomes are exchangeable. When they are
not, two things answer. An offset moves up with every promise that was missed and down with every one that was kept,
nine times as far up as down for a p90, so that it rests only where one in ten is missed, whatever the world does. And
a run of misses that chance does not explain is called drift: then all but the latest outcomes are forgotten, and their
worst stands for the quantile until the misses stop. Drift that goes on in spite of that is a state of its own, in
which predictions are as good as none.

Outcomes come late (a queue, a whole decode after their promise) and resemble their neighbours, which share a queue. So
promises are judged as they were made, and the steps are small against what may be under way: judged by the margin of
the moment, or with a limit on the offset, coverage on the conversation and Azure traces fell to .65 to .88.

Sources: V. Vovk et al., Algorithmic Learning in a Random World (split conformal quantile); I. Gibbs and E. Candes,
Adaptive Conformal Inference Under Distribution Shift, NeurIPS 2021; A. N. Angelopoulos et al., Conformal PID Control
for Time Series Prediction, NeurIPS 2023 (the offset: their quantile tracker, on top of the window).
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass
from enum import StrEnum

from gateway.core.errors import ConfigError
from gateway.core.types import Role

MAX_LOG_RATIO = math.log(1e4)
MIN_SPREAD = 1e-3


@dataclass(frozen=True)
class Calibration:
    """Settings of the margins. Memory is at most roles x buckets x `window_outcomes` numbers."""

    quantile: float = 0.9
    """The coverage that is kept and watched, 0 < quantile < 1."""
    window_outcomes: int = 1000
    recent_outcomes: int = 100
    """What is remembered through drift, and what drift is judged by; at least `min_outcomes`."""
    min_outcomes: int = 20
    """A bucket with fewer uses its role's margin; a role with fewer is cold."""
    step: float = 0.03
    """How far one miss moves the offset, in spreads of the window (a hit moves it back by a ninth of that)."""
    drift_misses: float = 7.0
    """Standard deviations above the expected number of recent misses that are called drift: 31 of 100 for a p90. Misses
    come in runs; at 3 of 20 the Azure trace, whose prediction never drifts, was called drifting all the time."""
    fallback_outcomes: int = 300
    """Drift that lasts for more is not answered by a margin: predictions are taken as worth nothing."""
    cold_factor: float = 2.0
    """The margin of ignorance: a prediction nobody has checked yet may well be off by two."""
    bucket_edges_tokens: tuple[int, ...] = (512, 2048, 8192, 32_768)

    def __post_init__(self) -> None:
        if not 0.0 < self.quantile < 1.0:
            raise ConfigError(f"calibration.quantile: must be between 0 and 1, not {self.quantile}")
        if not 1 <= self.min_outcomes <= self.recent_outcomes <= self.window_outcomes:
            raise ConfigError("calibration: must hold 1 <= min_outcomes <= recent_outcomes <= window_outcomes")
        if not self.cold_factor >= 1.0:
            raise ConfigError(f"calibration.cold_factor: must be at least 1, not {self.cold_factor}")

    def start(self) -> Margins:
        """Margins that have seen nothing."""
        return Margins(self)


class MarginState(StrEnum):
    """How far a role's margin can be relied on. The string is the metric label."""

    COLD = "cold"
    """Too few outcomes to say: the margin is that of ignorance."""
    STEADY = "steady"
    """The promise is kept."""
    DRIFTING = "drifting"
    """It was missed more often than chance explains: the margin is the worst of the latest outcomes."""
    FALLBACK = "fallback"
    """Drift goes on under that margin too: nothing should be refused on these predictions."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """How often the promise was kept over the latest outcomes."""

    target_ratio: float
    kept_ratio: float
    """1.0 while nothing was observed."""
    outcome_count: int
    """Since the start."""
    state: MarginState


class Margins:
    """A started `Calibration`. Deterministic: the same observations give the same margins."""

    def __init__(self, settings: Calibration) -> None:
        self._settings = settings
        self._by_role: dict[Role, _Scores] = {}
        self._by_bucket: dict[tuple[Role, int], _Scores] = {}
        self._kept: dict[Role, deque[bool]] = {}

    def observe(
        self, role: Role, tokens: int, *, predicted_s: float, actual_s: float, promised_s: float | None = None
    ) -> None:
        """Learns how a bare prediction compares with what happened; times that are not positive say nothing.

        `promised_s` is the quantile that was stated for it when it was sent; None: what would be stated now.
        """
        if not (0.0 < predicted_s < math.inf and 0.0 < actual_s < math.inf):
            return
        ratio = max(-MAX_LOG_RATIO, min(MAX_LOG_RATIO, math.log(actual_s) - math.log(predicted_s)))
        whole_role, bucket = self._scores(role, tokens)
        kept = self._kept.setdefault(role, deque(maxlen=self._settings.window_outcomes))
        promised_s = predicted_s * self.factor(role, tokens) if promised_s is None else promised_s
        is_kept = actual_s <= promised_s
        kept.append(is_kept)
        # The role's offset is for buckets that have none of their own yet; what a bucket promised is not its doing.
        whole_role.observe(ratio, is_kept, is_in_force=not self._is_judged(bucket))
        bucket.observe(ratio, is_kept, is_in_force=True)

    def upper(self, role: Role, tokens: int, prediction_s: float, quantile: float | None = None) -> float:
        """Seconds that the actual time stays under with probability `quantile` (default: the settings')."""
        return prediction_s * self.factor(role, tokens, quantile)

    def factor(self, role: Role, tokens: int, quantile: float | None = None) -> float:
        """What to multiply a prediction by; below 1 when predictions run high, `cold_factor` or more when cold."""
        level = self._settings.quantile if quantile is None else quantile
        whole_role, bucket = self._scores(role, tokens)
        if whole_role.state is MarginState.COLD:
            return max(self._settings.cold_factor, math.exp(whole_role.worst()))
        # Drift shows in the role as a whole before any one bucket has the outcomes to tell it from chance.
        is_judged = self._is_judged(bucket)
        margins = [bucket.margin(level)] if is_judged else []
        if whole_role.is_drifting or not is_judged:
            margins.append(whole_role.margin(level))
        least = self._settings.cold_factor if whole_role.state is MarginState.FALLBACK else 0.0
        return max(least, math.exp(max(margins)))

    def coverage(self, role: Role) -> Coverage:
        """How the role's promise was kept, over all lengths."""
        scores = self._by_role.get(role, _Scores(self._settings))
        kept = self._kept.get(role, ())
        return Coverage(
            target_ratio=self._settings.quantile,
            kept_ratio=sum(kept) / len(kept) if kept else 1.0,
            outcome_count=scores.count,
            state=scores.state,
        )

    def state(self, role: Role) -> MarginState:
        """How far the role's margin can be relied on."""
        return self._by_role[role].state if role in self._by_role else MarginState.COLD

    def _is_judged(self, bucket: _Scores) -> bool:
        return len(bucket) >= self._settings.min_outcomes

    def _scores(self, role: Role, tokens: int) -> tuple[_Scores, _Scores]:
        """The scores of the role and of its bucket, made when missing."""
        key = (role, bisect_left(self._settings.bucket_edges_tokens, tokens))
        whole_role, bucket = self._by_role.get(role), self._by_bucket.get(key)
        if whole_role is None:
            whole_role = self._by_role[role] = _Scores(self._settings)
        if bucket is None:
            bucket = self._by_bucket[key] = _Scores(self._settings)
        return whole_role, bucket


class _Scores:
    """The latest log ratios of one bucket, in order of arrival and in order of size."""

    __slots__ = ("_drift_outcomes", "_hits", "_offset", "_recent", "_settings", "_sorted", "count")

    def __init__(self, settings: Calibration) -> None:
        self._settings = settings
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []
        self._hits: deque[bool] = deque(maxlen=settings.recent_outcomes)
        self._offset = 0.0
        self._drift_outcomes = 0
        """Since drift was noticed; 0: there is none."""
        self.count = 0

    @property
    def is_drifting(self) -> bool:
        return self._drift_outcomes > 0

    @property
    def state(self) -> MarginState:
        if len(self) < self._settings.min_outcomes:
            return MarginState.COLD
        if not self.is_drifting:
            return MarginState.STEADY
        return MarginState.FALLBACK if self._drift_outcomes > self._settings.fallback_outcomes else MarginState.DRIFTING

    def __len__(self) -> int:
        return len(self._recent)

    def observe(self, ratio: float, is_kept: bool, *, is_in_force: bool) -> None:
        """Judges the promise, moves the offset if the promise was made with it, then learns from the outcome."""
        self.count += 1
        if len(self) >= self._settings.min_outcomes:
            if is_in_force:
                self._move(is_kept)
            self._watch(is_kept)
        self._recent.append(ratio)
        insort(self._sorted, ratio)
        while len(self._recent) > (
            self._settings.recent_outcomes if self.is_drifting else self._settings.window_outcomes
        ):
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]

    def margin(self, quantile: float) -> float:
        """The log of the factor for that quantile."""
        return (self.worst() if self.is_drifting else self._at(quantile)) + self._offset

    def worst(self) -> float:
        """The largest log ratio kept, 0 when there is none."""
        return self._sorted[-1] if self._sorted else 0.0

    def _spread(self) -> float:
        """From the 10 % to the 90 % quantile of the window."""
        return max(MIN_SPREAD, self._at(0.9) - self._at(0.1))

    def _at(self, level: float) -> float:
        # One more than the scores: the outcome to come is the (n+1)-th of an exchangeable row.
        rank = math.ceil(level * (len(self._sorted) + 1)) - 1
        return self._sorted[max(0, min(len(self._sorted) - 1, rank))]

    def _move(self, is_kept: bool) -> None:
        """Up for a promise missed, down for one kept, in the proportion that leaves it in place at the target."""
        quantile = self._settings.quantile
        push = (quantile - 1.0 if is_kept else quantile) * self._settings.step * self._spread()
        self._offset = max(-MAX_LOG_RATIO, min(MAX_LOG_RATIO, self._offset + push))

    def _watch(self, is_kept: bool) -> None:
        """Whether the latest promises were missed more often than chance explains."""
        settings = self._settings
        self._hits.append(is_kept)
        expected = len(self._hits) * (1.0 - settings.quantile)
        limit = expected + settings.drift_misses * math.sqrt(expected * settings.quantile)
        misses = len(self._hits) - sum(self._hits)
        is_drifting = misses > limit or (self.is_drifting and misses > expected)
        self._drift_outcomes = self._drift_outcomes + 1 if is_drifting else 0
