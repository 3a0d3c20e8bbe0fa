"""Token gaps of one stream in a fixed-size histogram: their mean, and the mean of the slowest 10 %."""

from __future__ import annotations

import math
from bisect import bisect_left

SHORTEST_S = 1e-4
BUCKETS_PER_DOUBLING = 4
"""Bucket edges 19 % apart; a bucket keeps its sum, so only a bucket cut by the 10 % line is approximated."""
BUCKETS = 1 + 20 * BUCKETS_PER_DOUBLING
"""Up to 100 s; longer gaps share the last bucket and keep their true sum."""
EDGES_S = tuple(SHORTEST_S * 2 ** (number / BUCKETS_PER_DOUBLING) for number in range(BUCKETS - 1))
"""Where each bucket but the first begins."""
SLOW_RATIO = 0.1


class GapHistogram:
    """Gaps between output tokens, in seconds. Memory does not grow with their number."""

    __slots__ = ("_counts", "_sums", "count", "total_s")

    def __init__(self) -> None:
        self._counts = [0] * BUCKETS
        self._sums = [0.0] * BUCKETS
        self.count = 0
        self.total_s = 0.0

    def add(self, gap_s: float, count: int = 1) -> None:
        """`count` tokens arrived together, `gap_s` >= 0 after the one before: one gap of that length, zeros else."""
        bucket = bisect_left(EDGES_S, gap_s)
        self._counts[bucket] += 1
        self._sums[bucket] += gap_s
        self.total_s += gap_s
        self.count += count
        if count > 1:
            self._counts[0] += count - 1

    @property
    def mean_s(self) -> float | None:
        """Mean gap (TPOT), seconds; None without gaps."""
        return self.total_s / self.count if self.count else None

    @property
    def slow_mean_s(self) -> float | None:
        """Mean of the slowest 10 % of gaps, at least one (TBT), seconds; None without gaps.

        Source: Mooncake, FAST'25 section 5.1 ("the mean of its longest 10 % of token intervals").
        """
        if not self.count:
            return None
        wanted = left = max(1, math.ceil(self.count * SLOW_RATIO))
        total_s = 0.0
        for count, sum_s in zip(reversed(self._counts), reversed(self._sums), strict=True):
            if count == 0:
                continue
            taken = min(count, left)
            total_s += sum_s * taken / count
            left -= taken
            if left == 0:
                break
        return total_s / wanted
