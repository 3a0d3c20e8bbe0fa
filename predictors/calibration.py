"""Margins that keep a stated coverage: the factor by which a prediction is raised to become a quantile.

Conformal prediction, online. Per role and length bucket the log ratios actual / predicted of the last outcomes are
kept, and the q-quantile of them is the margin; that holds its promise while outcomes are exchangeable. When they are
not, two things answer. The level itself moves with every miss and hit, which bounds the long-run coverage error
whatever the world does (adaptive conformal inference). And a run of misses that chance does not explain is called
drift: then all but the latest outcomes are forgotten, and their worst stands for the quantile until the misses stop.

Sources: V. Vovk et al., Algorithmic Learning in a Random World (split conformal quantile); I. Gibbs and E. Candes,
Adaptive Conformal Inference Under Distribution Shift, NeurIPS 2021 (the moving level).
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass

from gateway.core.errors import ConfigError
from gateway.core.types import Role

MAX_LOG_RATIO = math.log(1e4)


@dataclass(frozen=True)
class Calibration:
    """Settings of the margins. Memory is at most roles x buckets x `window_outcomes` numbers."""

    quantile: float = 0.9
    """The coverage that is kept and watched, 0 < quantile < 1."""
    window_outcomes: int = 200
    recent_outcomes: int = 20
    """What is remembered through drift, and what drift is judged by; at least `min_outcomes`."""
    min_outcomes: int = 20
    """A bucket with fewer uses its role's margin; a role with fewer is cold."""
    level_step: float = 0.01
    """How far one miss moves the level (a hit moves it back by a ninth of that, for a quantile of 0.9)."""
    drift_misses: float = 3.0
    """Standard deviations above the expected number of recent misses that are called drift."""
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


@dataclass(frozen=True, slots=True)
class Coverage:
    """How often the promise was kept over the latest outcomes."""

    target_ratio: float
    kept_ratio: float
    """1.0 while nothing was observed."""
    outcome_count: int
    """Since the start."""
    is_cold: bool
    is_drifting: bool


class Margins:
    """A started `Calibration`. Deterministic: the same observations give the same margins."""

    def __init__(self, settings: Calibration) -> None:
        self._settings = settings
        self._by_role: dict[Role, _Scores] = {}
        self._by_bucket: dict[tuple[Role, int], _Scores] = {}
        self._kept: dict[Role, deque[bool]] = {}

    def observe(self, role: Role, tokens: int, *, predicted_s: float, actual_s: float) -> None:
        """Learns how a bare prediction compares with what happened; times that are not positive say nothing."""
        if not (0.0 < predicted_s < math.inf and 0.0 < actual_s < math.inf):
            return
        ratio = max(-MAX_LOG_RATIO, min(MAX_LOG_RATIO, math.log(actual_s) - math.log(predicted_s)))
        whole_role, bucket = self._scores(role, tokens)
        kept = self._kept.setdefault(role, deque(maxlen=self._settings.window_outcomes))
        kept.append(ratio <= math.log(self.factor(role, tokens)))
        whole_role.observe(ratio)
        bucket.observe(ratio)

    def upper(self, role: Role, tokens: int, prediction_s: float, quantile: float | None = None) -> float:
        """Seconds that the actual time stays under with probability `quantile` (default: the settings')."""
        return prediction_s * self.factor(role, tokens, quantile)

    def factor(self, role: Role, tokens: int, quantile: float | None = None) -> float:
        """What to multiply a prediction by; below 1 when predictions run high, `cold_factor` or more when cold."""
        level = self._settings.quantile if quantile is None else quantile
        whole_role, bucket = self._scores(role, tokens)
        if len(whole_role) < self._settings.min_outcomes:
            return max(self._settings.cold_factor, math.exp(whole_role.worst()))
        if len(bucket) < self._settings.min_outcomes:
            return math.exp(whole_role.margin(level))
        # Drift shows in the role as a whole before any one bucket has the outcomes to tell it from chance.
        margins = [scores.margin(level) for scores in (bucket, whole_role) if scores is bucket or scores.is_drifting]
        return math.exp(max(margins))

    def coverage(self, role: Role) -> Coverage:
        """How the role's promise was kept, over all lengths."""
        scores = self._by_role.get(role, _Scores(self._settings))
        kept = self._kept.get(role, ())
        return Coverage(
            target_ratio=self._settings.quantile,
            kept_ratio=sum(kept) / len(kept) if kept else 1.0,
            outcome_count=scores.count,
            is_cold=len(scores) < self._settings.min_outcomes,
            is_drifting=scores.is_drifting,
        )

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

    __slots__ = ("_hits", "_level_shift", "_recent", "_settings", "_sorted", "count", "is_drifting")

    def __init__(self, settings: Calibration) -> None:
        self._settings = settings
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []
        self._hits: deque[bool] = deque(maxlen=settings.recent_outcomes)
        self._level_shift = 0.0
        self.count = 0
        self.is_drifting = False

    def __len__(self) -> int:
        return len(self._recent)

    def observe(self, ratio: float) -> None:
        """Judges the margin that was in force, then learns from the outcome."""
        self.count += 1
        if len(self) >= self._settings.min_outcomes:
            self._judge(ratio <= self.margin(self._settings.quantile))
        self._recent.append(ratio)
        insort(self._sorted, ratio)
        while len(self._recent) > (
            self._settings.recent_outcomes if self.is_drifting else self._settings.window_outcomes
        ):
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]

    def margin(self, quantile: float) -> float:
        """The log of the factor for that quantile."""
        return self.worst() if self.is_drifting else self._at(quantile + self._level_shift)

    def worst(self) -> float:
        """The largest log ratio kept, 0 when there is none."""
        return self._sorted[-1] if self._sorted else 0.0

    def _at(self, level: float) -> float:
        # One more than the scores: the outcome to come is the (n+1)-th of an exchangeable row.
        rank = math.ceil(level * (len(self._sorted) + 1)) - 1
        return self._sorted[max(0, min(len(self._sorted) - 1, rank))]

    def _judge(self, is_hit: bool) -> None:
        settings = self._settings
        self._hits.append(is_hit)
        miss_ratio = 1.0 - settings.quantile
        moved = self._level_shift + settings.level_step * ((0.0 if is_hit else 1.0) - miss_ratio) / settings.quantile
        self._level_shift = max(-settings.quantile, min(miss_ratio, moved))
        expected = len(self._hits) * miss_ratio
        limit = expected + settings.drift_misses * math.sqrt(expected * settings.quantile)
        misses = len(self._hits) - sum(self._hits)
        self.is_drifting = misses > limit or (self.is_drifting and misses > expected)
