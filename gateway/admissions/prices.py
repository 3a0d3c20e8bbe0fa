"""What a second of each stage is worth under overload: the dual prices of a small linear program.

Over the requests of the last minutes: keep the set of highest value whose prefill seconds fit into the prefill engines
and whose decode seconds fit into the decode engines. Its dual gives a price per second of either stage; a request whose
cost at these prices exceeds its value is one that an optimal choice would have left out. Where everything fits both
prices are zero. All costs are in seconds of the whole stage: a prefill second of one of eight engines is an eighth.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from gateway.admissions.costs import Cost

Floats = NDArray[np.float64]
LEAST_SPAN_S = 10.0
"""Before that much was seen nothing has a price: a few arrivals in a row are no overload."""
ROUNDS = 6
"""Of solving for one price with the other held; the second changes little, six are plenty."""


class Prices:
    """The prices of the recent past."""

    def __init__(self, *, window_s: float, max_requests: int, usable_ratio: float, renew_s: float = 1.0) -> None:
        self._window_s = window_s
        self._usable_ratio = usable_ratio
        self._renew_s = renew_s
        self._recent: deque[tuple[float, Cost]] = deque(maxlen=max_requests)
        self._renewed_at = float("-inf")
        self.prefill = 0.0
        """Value per second of the prefill stage, >= 0."""
        self.decode = 0.0
        """Value per second of the decode stage, >= 0."""

    def arrived(self, cost: Cost, *, share: float = 1.0, now: float) -> None:
        """Counts a request; renews the prices when that is due. `share` > 0 of both stages is for such as it."""
        self._recent.append((now, cost))
        if now - self._renewed_at >= self._renew_s:
            self._renewed_at = now
            self._renew(now, share)

    def of(self, cost: Cost) -> float:
        """What the request costs at these prices."""
        return self.prefill * cost.prefill_s + self.decode * cost.decode_s

    def _renew(self, now: float, share: float) -> None:
        while self._recent and self._recent[0][0] < now - self._window_s:
            self._recent.popleft()
        span_s = now - self._recent[0][0] if self._recent else 0.0
        if span_s < min(LEAST_SPAN_S, 0.1 * self._window_s):
            return
        table = np.array([(cost.prefill_s, cost.decode_s, cost.value) for _, cost in self._recent])
        capacity_s = self._usable_ratio * span_s * share
        self.prefill, self.decode = dual_prices(table[:, 0], table[:, 1], table[:, 2], capacity_s)


def dual_prices(prefill_s: Floats, decode_s: Floats, value: Floats, capacity_s: float) -> tuple[float, float]:
    """Value per second of both stages, each of `capacity_s` > 0; the arrays have shape (requests,)."""
    prefill = decode = 0.0
    for _ in range(ROUNDS):
        prefill = _price(prefill_s, value - decode * decode_s, capacity_s)
        decode = _price(decode_s, value - prefill * prefill_s, capacity_s)
    return prefill, decode


def _price(seconds: Floats, worth: Floats, capacity_s: float) -> float:
    """The price at which just those are worth their seconds that fit; 0 when all of them do."""
    wanted = worth > 0.0
    seconds, worth = np.maximum(seconds[wanted], 1e-12), worth[wanted]
    if seconds.sum() <= capacity_s:
        return 0.0
    per_second = worth / seconds
    order = np.argsort(-per_second, kind="stable")
    last = int(np.searchsorted(np.cumsum(seconds[order]), capacity_s))
    return float(per_second[order[min(last, len(order) - 1)]])
