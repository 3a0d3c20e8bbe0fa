"""A token bucket: so much a second, and after a pause as much as would have come in `burst_s`. Pure."""

from __future__ import annotations


class Bucket:
    """What may be used now. A cost above all it can hold is let in when it is full, and paid off afterwards."""

    def __init__(self, rate_per_s: float, *, burst_s: float) -> None:
        """Full at first. A bucket holds one unit at least: a rate below one in `burst_s` would never let any in."""
        self._rate_per_s = rate_per_s
        self._capacity = max(1.0, rate_per_s * burst_s)
        self._level = self._capacity
        self._at: float | None = None

    def wait_s(self, cost: float, *, now: float) -> float:
        """Seconds until that cost may be taken; 0 when it may now."""
        self._fill(now)
        return max(0.0, (min(cost, self._capacity) - self._level) / self._rate_per_s)

    def take(self, cost: float, *, now: float) -> None:
        """Uses that much, whether or not it is there."""
        self._fill(now)
        self._level -= cost

    def _fill(self, now: float) -> None:
        elapsed_s = 0.0 if self._at is None else max(0.0, now - self._at)
        self._at = now
        self._level = min(self._capacity, self._level + elapsed_s * self._rate_per_s)
