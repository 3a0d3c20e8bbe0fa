"""Prefixes on their way from one prefill engine to another, because the gateway found pulling cheaper than computing.

The prefill keeps its place in its engine's queue meanwhile, and those behind it wait with it if its turn comes first.
What the engine drops before that turn is computed.
"""

from __future__ import annotations

from loadtest.agenda import Agenda, Alarm
from loadtest.flight import Flight
from loadtest.links import Links
from loadtest.sim_engines import SimEngine


class PrefixPulls:
    """The pulls under way, over the same ports out of the holders as every hand-off."""

    def __init__(self, links: Links, agenda: Agenda, touched: dict[str, SimEngine]) -> None:
        """`touched` takes in the engines whose next step may have moved."""
        self._links = links
        self._touched = touched
        self._under_way: dict[str, dict[str, Flight]] = {}
        """Port into an engine -> leg id -> request."""
        self._alarm = Alarm(agenda, self._land)

    def start(self, flight: Flight, token_bytes: float, *, now: float) -> None:
        """Begins to pull what the flight's dispatch says."""
        assert flight.dispatch is not None, "it was dispatched"
        estimate = flight.dispatch.estimate
        assert estimate.fetch_from is not None, "it pulls a prefix"
        port = f"{estimate.prefill}/prefix"
        self._under_way.setdefault(port, {})[flight.leg_id] = flight
        size_bytes = estimate.fetched_tokens * token_bytes
        self._links.start(estimate.fetch_from, port, flight.leg_id, size_bytes, now=now)

    def refresh(self, now: float) -> None:
        """Asks the links anew when the next pull ends."""
        if self._under_way:
            ends = [at for port in self._under_way if (at := self._links.next_done_at(port)) is not None]
            self._alarm.set(min(ends, default=None), now=now)

    def _land(self, now: float) -> None:
        for port in list(self._under_way):
            pulls = self._under_way[port]
            for leg_id in self._links.take_done(port, now=now):
                self._arrived(pulls.pop(leg_id), leg_id, now)
            if not pulls:
                del self._under_way[port]

    def _arrived(self, flight: Flight, leg_id: str, now: float) -> None:
        engine, dispatch = flight.prefill, flight.dispatch
        if engine is None or dispatch is None or leg_id not in engine.legs or engine.model is None:
            return  # that attempt failed meanwhile
        block_count = dispatch.estimate.cached_tokens // engine.model.settings.block_tokens
        engine.model.prefix_arrived(leg_id, flight.keys[:block_count], now=now)
        self._touched[engine.id] = engine
