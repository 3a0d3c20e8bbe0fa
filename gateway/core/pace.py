"""How often something happens, as a slowly forgetting mean."""

from __future__ import annotations

FORGET = 0.05
"""Weight of the newest interval: the mean covers about the last 20, a few seconds of a busy gateway."""


class Pace:
    """The mean interval between ticks, in seconds."""

    def __init__(self) -> None:
        self._last_at: float | None = None
        self._interval_s: float | None = None

    @property
    def interval_s(self) -> float | None:
        """Mean seconds between ticks, >= 0; None before the second tick."""
        return self._interval_s

    def tick(self, now: float) -> None:
        """It happened. Ticks never go back in time."""
        if self._last_at is not None:
            gap_s = now - self._last_at
            known_s = self._interval_s
            self._interval_s = gap_s if known_s is None else known_s + FORGET * (gap_s - known_s)
        self._last_at = now
