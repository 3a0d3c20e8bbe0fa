"""Prefixes on their way from one prefill engine to another, because the gateway found pulling cheaper than computing.

The prefill joins its engine's queue when the prefix has arrived. What the holder dropped meanwhile is computed.
"""

from __future__ import annotations

from collections.abc import Callable

from loadtest.agenda import Agenda, Alarm
from loadtest.flight import Flight
from loadtest.links import Links

ARRIVED = Callable[[Flight, float], None]


class PrefixPulls:
    """The pulls under way, over the same ports out of the holders as every hand-off."""

    def __init__(self, links: Links, agenda: Agenda, arrived: ARRIVED) -> None:
        self._links = links
        self._arrived = arrived
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
            landed = [pulls.pop(leg_id) for leg_id in self._links.take_done(port, now=now)]
            if not pulls:
                del self._under_way[port]
            for flight in landed:
                self._adopt(flight)
                self._arrived(flight, now)

    def _adopt(self, flight: Flight) -> None:
        assert flight.dispatch is not None, "nothing ends a pull but its arrival"
        assert flight.prefill is not None, "nothing ends a pull but its arrival"
        model = flight.prefill.model
        if model is not None:
            model.adopt_prefix(flight.keys[: flight.dispatch.estimate.cached_tokens // model.settings.block_tokens])
