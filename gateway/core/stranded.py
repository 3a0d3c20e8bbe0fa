"""KV that nobody will read: blocks that a prefill engine keeps for a hand-off which has failed, times seconds.

Where the decode engine cannot tell the prefill engine that it wants nothing any more, only the connector's own lease
frees the blocks. That is the least that such a failure costs, and it stands beside what was counted. An engine that
dies frees them too.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field

MAX_OPEN = 65_536
"""Failed hand-offs counted at once. Beyond it the one that ends first counts as if its time were over."""


@dataclass(order=True, slots=True)
class _Hold:
    ends_at: float
    began_at: float
    connector: str = field(compare=False)
    engine_id: str = field(compare=False)
    blocks: int = field(compare=False)

    def block_s(self, now: float) -> float:
        return self.blocks * (max(self.began_at, min(now, self.ends_at)) - self.began_at)


@dataclass(frozen=True, slots=True)
class Stranded:
    """What one connector has cost."""

    hand_offs: int
    """Failed hand-offs whose blocks nobody could free but a lease."""
    blocks: int
    """Blocks held for them now."""
    block_s: float
    """Blocks times seconds, up to now."""
    hold_s: float
    """Seconds that the connector holds each at least."""


@dataclass(slots=True)
class _Total:
    hold_s: float
    hand_offs: int = 0
    block_s: float = 0.0


class StrandedKv:
    """The count of all failed hand-offs, by connector."""

    def __init__(self) -> None:
        self._open: list[_Hold] = []
        self._totals: dict[str, _Total] = {}

    def add(self, connector: str, engine_id: str, *, blocks: int, hold_s: float, now: float) -> None:
        """A hand-off failed now: `blocks` stay at the prefill engine for `hold_s` more seconds. 0 of them: nothing."""
        if blocks <= 0 or hold_s <= 0:
            return
        self._settle(now)
        total = self._totals.setdefault(connector, _Total(hold_s))
        total.hold_s = hold_s
        total.hand_offs += 1
        heapq.heappush(self._open, _Hold(now + hold_s, now, connector, engine_id, blocks))
        while len(self._open) > MAX_OPEN:
            self._close(heapq.heappop(self._open), now + hold_s)

    def engine_down(self, engine_id: str, *, now: float) -> None:
        """The prefill engine is gone, and what it held with it."""
        for hold in self._open:
            if hold.engine_id == engine_id:
                self._close(hold, now)
        self._open = [hold for hold in self._open if hold.engine_id != engine_id]
        heapq.heapify(self._open)

    def by_connector(self, *, now: float) -> Mapping[str, Stranded]:
        """What each connector has cost up to now."""
        self._settle(now)
        held = dict.fromkeys(self._totals, 0)
        block_s = {name: total.block_s for name, total in self._totals.items()}
        for hold in self._open:
            held[hold.connector] += hold.blocks
            block_s[hold.connector] += hold.block_s(now)
        return {
            name: Stranded(total.hand_offs, held[name], block_s[name], total.hold_s)
            for name, total in sorted(self._totals.items())
        }

    def _settle(self, now: float) -> None:
        while self._open and self._open[0].ends_at <= now:
            self._close(heapq.heappop(self._open), now)

    def _close(self, hold: _Hold, now: float) -> None:
        self._totals[hold.connector].block_s += hold.block_s(now)
