"""When the refused are to come back: as many at one time as can be served then, and no crowd at one instant.

Whoever is refused is told when it is expected to be admitted, and gets that much of the time after it as its own: the
next of the same model who is refused is told a later time. Within its own time the instant follows from its id, so
that a journal replayed tells the same. Nothing is held back for those who come back: a place is a forecast, no promise.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from zlib import crc32

from gateway.core.cluster import EngineState
from gateway.core.interfaces import Patience
from gateway.core.types import Estimate, Request, WaitReason

MAX_RETURN_S = 120.0
"""The latest time that is told: no forecast of a load is worth more. Those beyond come in its second half."""
MAX_PLACES = 4096
"""Places that are kept of each model: a return each 29 ms until the latest time."""
MAX_MODELS = 64
"""Models with a line of their own; the others share one. Engines that do not say what they serve take any name."""
MIN_SLOT_S = 1e-3
"""The shortest time of one's own: the unit of `retry-after-ms`."""


class Returns:
    """The times at which those who were refused were told to come back."""

    def __init__(self) -> None:
        """Nobody was refused yet."""
        self._lines: dict[str, list[tuple[float, float]]] = {}
        """By model: own times (from, until), instants, ascending, none overlapping another."""

    def __len__(self) -> int:
        """Places that are kept."""
        return sum(map(len, self._lines.values()))

    def book(self, request: Request, *, ready_s: float, slot_s: float, now: float) -> float:
        """Seconds until it is to come back: the first `slot_s` seconds nobody was given from `ready_s` seconds on.

        At least `ready_s` while that is below nine tenths of `MAX_RETURN_S`, which is never passed.
        """
        line = self._line(request.model, now)
        slot_s = max(slot_s, MIN_SLOT_S)
        share = crc32(request.id.encode()) / 2**32
        start_at = _first_gap_at(line, now + ready_s, slot_s)
        if start_at + slot_s > now + MAX_RETURN_S or len(line) >= MAX_PLACES:
            earliest_s = min(max(ready_s, 0.5 * MAX_RETURN_S), 0.9 * MAX_RETURN_S)
            return earliest_s + share * (MAX_RETURN_S - earliest_s)
        insort(line, (start_at, start_at + slot_s))
        return start_at - now + share * slot_s

    def _line(self, model: str, now: float) -> list[tuple[float, float]]:
        """The line of a model, without what is over."""
        for name in list(self._lines):
            places = self._lines[name]
            del places[: bisect_left(places, now, key=lambda place: place[1])]
            if not places:
                del self._lines[name]
        name = model if model in self._lines or len(self._lines) < MAX_MODELS else ""
        return self._lines.setdefault(name, [])


def _first_gap_at(line: list[tuple[float, float]], from_at: float, slot_s: float) -> float:
    """The first instant >= `from_at` with `slot_s` seconds that nobody has."""
    start_at = from_at
    for place_from_at, until_at in line[bisect_left(line, from_at, key=lambda place: place[1]) :]:
        if place_from_at - start_at >= slot_s:
            break
        start_at = max(start_at, until_at)
    return start_at


def prefill_return_s(
    request: Request, best: Estimate, prefills: Iterable[EngineState], waiting: Iterable[Patience], *, now: float
) -> tuple[float, float]:
    """Seconds until the prefill engines have worked off so much that its first token would be in time, and for how
    many seconds it will keep all of them busy.

    Ahead of it is what the engines have, and those of `waiting` who wait for a prefill engine. Without a bound on the
    first token it is served when all of that is done.
    """
    work_s = [state.prefill_work_s(now) for state in prefills]
    engines = max(1, len(work_s))
    queued_s = sum(each.best.prefill_s for each in waiting if each.best and each.reason is WaitReason.PREFILL_BUSY)
    slack_s = 0.0 if request.slo.ttft_s is None else request.slo.ttft_s - (best.ttft_s - best.wait_s)
    return max(0.0, (sum(work_s) + queued_s) / engines - max(0.0, slack_s)), best.prefill_s / engines


def place_return_s(interval_s: float, waiting: Iterable[Patience]) -> tuple[float, float]:
    """Seconds until a place at a decode engine is left for it, one each `interval_s` s, and until the next one after.

    Those of `waiting` who wait for a place have the first ones.
    """
    ahead = sum(each.reason is WaitReason.DECODE_FULL for each in waiting)
    return (ahead + 1) * interval_s, interval_s
