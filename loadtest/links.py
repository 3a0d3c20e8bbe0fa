"""The network of a simulation: the fabric's shared ports, some of which may be slower than they should be."""

from __future__ import annotations

from loadtest.fabric import Fabric


class Links(Fabric):
    """A fabric in which an engine's port can lose speed."""

    def __init__(self, *, bytes_per_s: float, latency_s: float) -> None:
        super().__init__(bytes_per_s=bytes_per_s, latency_s=latency_s)
        self.change_count = 0
        """How often the ends of transfers may have moved."""
        self._slowdowns: dict[str, float] = {}

    def slow_down(self, engine_id: str, factor: float, *, now: float) -> None:
        """Lets transfers from and to the engine take `factor` > 0 times as long; 1 is health."""
        self._advance(now)
        self._slowdowns[engine_id] = factor
        self._share()

    def _share(self) -> None:
        super()._share()
        self.change_count += 1
        for transfer in self._transfers.values() if self._slowdowns else ():
            ends = (self._slowdowns.get(end, 1.0) for end in (transfer.source, transfer.target))
            transfer.bytes_per_s /= max(ends)
