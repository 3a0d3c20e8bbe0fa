"""When the refused are to come back: as many at one time as can be served then, and no crowd at one instant.

Whoever is refused is told when it is expected to be admitted, and gets that much of the time after it as its own: the
next of the same model who is refused is told a later time. Within its own time the instant follows from its id, so
that a journal replayed tells the same. No engine idles for those who come back, but whoever comes when it was told to
is expected: a rule that chooses among those who wait may keep them before those who were never refused.

Whoever asks again and again before its time is told the same times again, so that one who hammers does not fill the
line. Clients are told apart by tenant, number (their address) and prompt; those behind one proxy who ask the same have
`MAX_ALIKE` places, which further ones share. Clients without a number are all different, and never expected.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from typing import TypeAlias
from zlib import crc32

from gateway.core.cluster import EngineState
from gateway.core.interfaces import Patience
from gateway.core.types import Estimate, Request, WaitReason

Client: TypeAlias = tuple[str, int, int, int]

MAX_RETURN_S = 120.0
"""The latest time that is told: no forecast of a load is worth more. Those beyond come in its second half."""
MAX_PLACES = 4096
"""Places that are kept of each model: a return each 29 ms until the latest time."""
MAX_MODELS = 64
"""Models with a line of their own; the others share one. Engines that do not say what they serve take any name."""
MAX_ALIKE = 8
"""Places that are open at a time for one prompt from one address."""
LATE_S = 2.0
"""How much later than its time one may come: `Retry-After` is in whole seconds, and it has a way to go."""
MIN_SLOT_S = 1e-3
"""The shortest time of one's own: the unit of `retry-after-ms`."""


class Returns:
    """The times at which those who were refused were told to come back."""

    def __init__(self) -> None:
        """Nobody was refused yet."""
        self._lines: dict[str, _Line] = {}
        """By model."""

    def __len__(self) -> int:
        """Places that are kept."""
        return sum(len(line.places) for line in self._lines.values())

    def book(self, request: Request, *, ready_s: float, slot_s: float, now: float) -> float:
        """Seconds until it is to come back: the first `slot_s` seconds nobody was given from `ready_s` seconds on.

        At least `ready_s` while that is below nine tenths of `MAX_RETURN_S`, which is never passed; less only for those
        who ask again, or the same as others: they have one of the times that were given to them.
        """
        line = self._line(request.model, now)
        share = crc32(request.id.encode()) / 2**32
        client = client_of(request)
        own = [place for place in line.own.get(client, ()) if place[1] > now]
        if client is not None and len(own) >= MAX_ALIKE:
            start_at, until_at, _ = own[int(share * len(own))]
            return start_at - now + share * (until_at - start_at) if start_at > now else share * (until_at - now)
        slot_s = max(slot_s, MIN_SLOT_S)
        start_at = line.first_gap_at(now + ready_s, slot_s)
        if start_at + slot_s > now + MAX_RETURN_S or len(line.places) >= MAX_PLACES:
            earliest_s = min(max(ready_s, 0.5 * MAX_RETURN_S), 0.9 * MAX_RETURN_S)
            return earliest_s + share * (MAX_RETURN_S - earliest_s)
        line.add(client, start_at, start_at + slot_s)
        return start_at - now + share * slot_s

    def take(self, request: Request, *, now: float) -> bool:
        """Whether it comes back when it was told to; its place is used then."""
        client = client_of(request)
        line = self._line(request.model, now)
        for place in line.own.get(client, ()) if client is not None else ():
            if place[0] <= now:
                line.remove(client, place)
                return True
        return False

    def _line(self, model: str, now: float) -> _Line:
        """The line of a model, without what is over."""
        for name in list(self._lines):
            line = self._lines[name]
            line.forget(now)
            if not line.places:
                del self._lines[name]
        name = model if model in self._lines or len(self._lines) < MAX_MODELS else ""
        return self._lines.setdefault(name, _Line())


class _Line:
    """The times that those who want one model were given."""

    def __init__(self) -> None:
        self.places: list[tuple[float, float, int]] = []
        """Own times (from, until), instants, ascending, none overlapping another, and a number."""
        self.own: dict[Client | None, list[tuple[float, float, int]]] = {}
        """The same by client, in the order in which they were given."""
        self._owners: dict[int, Client | None] = {}
        self._count = 0

    def add(self, client: Client | None, from_at: float, until_at: float) -> None:
        """These seconds are given to it."""
        place = (from_at, until_at, self._count)
        self._owners[self._count] = client
        self._count += 1
        insort(self.places, place)
        self.own.setdefault(client, []).append(place)

    def remove(self, client: Client | None, place: tuple[float, float, int]) -> None:
        """Its time is used, or over."""
        del self.places[bisect_left(self.places, place)]
        del self._owners[place[2]]
        own = self.own[client]
        own.remove(place)
        if not own:
            del self.own[client]

    def forget(self, now: float) -> None:
        """Drops what is over, and nobody can be on the way for."""
        for place in self.places[: bisect_left(self.places, now - LATE_S, key=lambda place: place[1])]:
            self.remove(self._owners[place[2]], place)

    def first_gap_at(self, from_at: float, slot_s: float) -> float:
        """The first instant >= `from_at` with `slot_s` seconds that nobody has."""
        start_at = from_at
        for place_from_at, until_at, _ in self.places[bisect_left(self.places, from_at, key=lambda place: place[1]) :]:
            if place_from_at - start_at >= slot_s:
                break
            start_at = max(start_at, until_at)
        return start_at


def client_of(request: Request) -> Client | None:
    """Who it is: tenant, number, and the length and last block hash of the prompt; None: nobody knows."""
    if request.client is None:
        return None
    hashes = [row for row in request.block_hashes.values() if len(row)]
    return request.tenant, request.client, request.prompt_tokens, int(hashes[0][-1]) if hashes else 0


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
