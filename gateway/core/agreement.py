"""Whether what we believe an engine has cached is what it reports: the last few comparisons, and a verdict."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

WINDOW = 40
"""Comparisons that count."""
MIN_CHECKS = 10
"""No verdict on fewer: one eviction in flight is not a wrong index."""
MAX_WRONG_RATIO = 0.5


@dataclass(slots=True)
class Agreement:
    """Predicted against reported cached tokens of one engine, the last `WINDOW` requests."""

    checked_count: int = 0
    """Since the start."""
    agreed_count: int = 0
    """Of these, exactly equal."""
    _recent: deque[bool] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def check(
        self, *, predicted_tokens: int, reported_tokens: int, block_tokens: int, may_know_less: bool = False
    ) -> None:
        """Compares one request; within one block counts as right, for a block may come or go in flight.

        `may_know_less`: more than was predicted is right too, where what others put there is never seen.
        """
        self.checked_count += 1
        self.agreed_count += predicted_tokens == reported_tokens
        missing_tokens = 0 if may_know_less else reported_tokens - predicted_tokens
        self._recent.append(max(predicted_tokens - reported_tokens, missing_tokens) <= block_tokens)

    @property
    def ratio(self) -> float | None:
        """Share of the recent comparisons that were right, 0 <= ratio <= 1; None before the first."""
        return sum(self._recent) / len(self._recent) if self._recent else None

    @property
    def is_wrong(self) -> bool:
        """Whether so many are wrong that it must not be believed."""
        ratio = self.ratio
        return ratio is not None and len(self._recent) >= MIN_CHECKS and 1 - ratio > MAX_WRONG_RATIO

    def forget(self) -> None:
        """The engine's cache began anew: earlier comparisons say nothing."""
        self._recent.clear()
