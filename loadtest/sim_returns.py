"""Clients that come back: what those who are refused do in a simulation, and those who ask again and again.

A client that obeys comes back when it was told to, as its SDK does with `retry-after-ms`; one that hammers comes back
after a tenth of a second whatever it was told. Each time is a request of its own, with an id and an arrival of its own,
and its bounds count from there. A run's `flights` hold the last one of each client, its `visits` all of them.
Hammerers are clients beside the workload: they ask the same until they are answered, and then once more, to the end
of the run, and no figure of the run counts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from gateway.core.errors import ConfigError
from loadtest.report import Status
from loadtest.workload import TraceRequest

if TYPE_CHECKING:
    from loadtest.flight import Flight

HAMMER_S = 0.1
"""Between a refusal and the next request of a client that hammers."""


class Manner(StrEnum):
    """What a refused client does. The string is the flag's value."""

    OBEY = "obey"
    HAMMER = "hammer"


@dataclass(frozen=True, slots=True)
class Returning:
    """How the clients of the workload come back."""

    manner: Manner = Manner.OBEY
    max_visits: int = 20
    """A client that was refused so often gives up."""

    def __post_init__(self) -> None:
        if self.max_visits < 1:
            raise ConfigError(f"a client comes at least once, not {self.max_visits} times")


@dataclass(frozen=True, slots=True)
class Visit:
    """One request of a client."""

    client: int
    """In order of arrival; hammerers have a count of their own."""
    trace: TraceRequest
    number: int = 1
    """1 for its first one."""
    is_hammering: bool = False
    """Whether it is of a client beside the workload."""

    @property
    def client_number(self) -> int:
        """What the gateway tells clients apart by: each has an address of its own."""
        return -1 - self.client if self.is_hammering else self.client

    @property
    def request_id(self) -> str:
        """Its id: `r7`, then `r7~2`, `r7~3`; hammerers are `h0`, `h0~2`."""
        name = f"{'h' if self.is_hammering else 'r'}{self.client}"
        return name if self.number == 1 else f"{name}~{self.number}"


class Visitors:
    """Who is still there, and who comes back when."""

    def __init__(self, returning: Returning | None, hammerers: Sequence[TraceRequest]) -> None:
        """`hammerers` are the requests of the clients beside the workload."""
        self._returning = returning
        self.hammerers = [Visit(number, trace, is_hammering=True) for number, trace in enumerate(hammerers)]
        self.open_count = 0
        """Clients of the workload that came and have neither their answer nor given up."""

    def first(self, client: int, trace: TraceRequest) -> Visit:
        """A client of the workload comes for the first time."""
        self.open_count += 1
        return Visit(client, trace)

    def over(self, flight: Flight, told_s: float | None, now: float) -> tuple[float, Visit] | None:
        """When it asks again, and with what; None when it does not. `told_s` is what its refusal said."""
        visit = flight.visit
        assert flight.outcome is not None, "it is over"
        again = replace(visit, number=visit.number + 1)
        if visit.is_hammering:
            return now + HAMMER_S, again
        is_refused = flight.outcome.status is Status.REFUSED
        if is_refused and self._returning is not None and visit.number < self._returning.max_visits:
            if self._returning.manner is Manner.HAMMER:
                return now + HAMMER_S, again
            if told_s is not None:
                return now + told_s, again
        self.open_count -= 1
        return None


def return_figures(visits: Sequence[Flight], attained: Sequence[bool]) -> dict[str, int | float | None]:
    """What came of those who came back; ratios are of requests after a client's first, None without any.

    `refused_clients` were refused the first time; `admitted_ratio` of all returns were not refused, of the first ones
    `admitted_at_once_ratio`; `attained_ratio` of all met their bounds. Shape of `attained`: (visits,).
    """
    later = [(flight, met) for flight, met in zip(visits, attained, strict=True) if flight.visit.number > 1]
    admitted = [_is_admitted(flight) for flight, _ in later]
    second = [is_in for (flight, _), is_in in zip(later, admitted, strict=True) if flight.visit.number == 2]
    return {
        "refused_clients": sum(flight.visit.number == 1 and not _is_admitted(flight) for flight in visits),
        "returns": len(later),
        "most_visits": max((flight.visit.number for flight in visits), default=0),
        "admitted_ratio": _ratio(admitted),
        "admitted_at_once_ratio": _ratio(second),
        "attained_ratio": _ratio([met for _, met in later]),
    }


def _is_admitted(flight: Flight) -> bool:
    return flight.outcome is not None and flight.outcome.status is not Status.REFUSED


def _ratio(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None
