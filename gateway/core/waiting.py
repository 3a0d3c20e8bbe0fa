"""The bounded queue in front of prefill: requests that no engine has room for now, in the order to try them.

The order has three levels. First the class: a request that asked for some bound goes before one that asked for none
(best effort), and then the higher priority before the lower. Within a class the tenant that was served least for its
weight (core/fairness.py). Of one tenant the request with the least slack, which is the one that has to start earliest.

A class must not starve: one of which a request waits, and of which none was sent for `starve_s` seconds, has its next
request tried before all others. So a class gets at least one turn in `starve_s` as long as anything is sent at all,
and no more than that: a flood of a low class cannot age itself in front of a high one.

Each step of the order costs a logarithm of what waits, so a wake-up that sends two requests and then finds the engines
full does not sort a thousand.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from math import inf
from typing import TypeAlias, TypeVar

from gateway.core.fairness import Fairness
from gateway.core.types import Request

STARVE_S = 10.0
"""A third of the 30 s a request may wait by default: a class that is always passed over still has three turns in it."""

Group: TypeAlias = tuple[str, bool]
"""(model, can be handed off): requests that compete for the same engines."""
_Key: TypeAlias = tuple[float, float, str]
"""(latest start, arrival, id): the order within one tenant."""
_Name = TypeVar("_Name", bound=Hashable)


def latest_start_at(request: Request) -> float:
    """The instant by which the request's first bound is broken if it still waits; inf where no bound counts time."""
    slo = request.slo
    bounds_s = [bound_s for bound_s in (slo.ttft_s, slo.deadline_s) if bound_s is not None]
    return request.arrived_at + min(bounds_s, default=inf)


def group_of(request: Request) -> Group:
    """Which engines the request competes for."""
    return request.model, request.can_hand_off


@dataclass(frozen=True, slots=True)
class Ended:
    """A request whose wait is over."""

    request: Request
    is_late: bool
    """It can no longer keep its bounds; else it waited as long as any request may."""


@dataclass(slots=True)
class _Line:
    """The waiting requests of one tenant in one class."""

    number: int
    """Lines are numbered as they begin: of two tenants with equal tags the one that has waited longer goes first."""
    keys: list[_Key] = field(default_factory=list)

    def after(self, key: _Key | tuple[()]) -> _Key | None:
        """The next key above that one; None at the end."""
        position = bisect_right(self.keys, key)
        return self.keys[position] if position < len(self.keys) else None


@dataclass(slots=True)
class _Class:
    """The waiting requests of one class, by tenant."""

    since: float
    """Since when it has waited for a turn."""
    lines: dict[str, _Line] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Entry:
    request: Request
    until_at: float
    latest_at: float

    @property
    def rank(self) -> tuple[bool, int]:
        """Its class: the lowest rank is tried first."""
        return rank_of(self.request)

    @property
    def key(self) -> _Key:
        return self.latest_at, self.request.arrived_at, self.request.id

    @property
    def end_at(self) -> float:
        return min(self.until_at, self.latest_at)


def rank_of(request: Request) -> tuple[bool, int]:
    """The request's class; of two classes the one with the lower rank is tried first."""
    return not request.slo.has_bounds, -request.priority


class WaitingQueue:
    """At most `limit` requests, each with the instant its wait ends."""

    def __init__(self, limit: int, *, fairness: Fairness | None = None, starve_s: float = STARVE_S) -> None:
        """`starve_s` > 0 bounds how long a class that waits goes without a turn."""
        self.limit = limit
        self.fairness = fairness or Fairness()
        self._starve_s = starve_s
        self._entries: dict[str, _Entry] = {}
        self._classes: dict[tuple[bool, int], _Class] = {}
        self._ends: list[tuple[float, str]] = []
        self._groups: Counter[Group] = Counter()
        self._tenants: Counter[str] = Counter()
        self._lines_begun = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._entries

    @property
    def is_full(self) -> bool:
        return len(self._entries) >= self.limit

    @property
    def group_count(self) -> int:
        """How many groups wait: when none of them has room, nobody has."""
        return len(self._groups)

    def has_group(self, group: Group) -> bool:
        """Whether somebody waits for the same engines: a newcomer must not overtake them."""
        return group in self._groups

    # ---- in and out -------------------------------------------------------------------------------------------------

    def add(self, request: Request, until_at: float, latest_at: float = inf) -> None:
        """Takes in a request that waits until `until_at` at most. It must not be waiting already.

        `latest_at` is the last instant at which its prefill may begin and still keep its bounds.
        """
        assert request.id not in self._entries, f"request {request.id} waits twice"
        assert not self.is_full, "the waiting queue is over its bound"
        entry = self._entries[request.id] = _Entry(request, until_at, latest_at)
        if not self._tenants[request.tenant]:
            self.fairness.begin(request.tenant)
        self._tenants[request.tenant] += 1
        self._groups[group_of(request)] += 1
        waiting = self._classes.setdefault(entry.rank, _Class(since=request.arrived_at))
        if request.tenant not in waiting.lines:
            self._lines_begun += 1
            waiting.lines[request.tenant] = _Line(self._lines_begun)
        insort(waiting.lines[request.tenant].keys, entry.key)
        heapq.heappush(self._ends, (entry.end_at, request.id))
        self._sweep()

    def remove(self, request_id: str) -> Request | None:
        """Takes a request out. None when it does not wait."""
        entry = self._entries.pop(request_id, None)
        if entry is None:
            return None
        request = entry.request
        _take(self._groups, group_of(request))
        waiting = self._classes[entry.rank]
        keys = waiting.lines[request.tenant].keys
        del keys[bisect_left(keys, entry.key)]
        if not keys:
            del waiting.lines[request.tenant]
        if not waiting.lines:
            del self._classes[entry.rank]
        if _take(self._tenants, request.tenant) == 0:
            self.fairness.end(request.tenant)
        return request

    def make_room(self, newcomer: Request) -> Request | None:
        """Takes out the request that has to go so that the newcomer may wait; None when the newcomer has to.

        The one with the most slack, of the tenant that has most waiting for its weight, in the lowest class. It goes
        when its class is below the newcomer's, or its tenant still has more waiting than the newcomer's would have.
        """
        rank = max(self._classes, default=None)
        if rank is None or rank < rank_of(newcomer):
            return None
        lines = self._classes[rank].lines
        shares = {tenant: len(line.keys) / self.fairness.weight(tenant) for tenant, line in lines.items()}
        tenant = max(shares, key=lambda name: (shares[name], lines[name].number))
        if rank == rank_of(newcomer):
            own = lines.get(newcomer.tenant)
            count = len(own.keys) if own else 0
            if tenant == newcomer.tenant or (count + 1) / self.fairness.weight(newcomer.tenant) >= shares[tenant]:
                return None
        return self.remove(lines[tenant].keys[-1][2])

    # ---- the order --------------------------------------------------------------------------------------------------

    def in_order(self, *, now: float) -> Iterator[Request]:
        """The waiting requests in the order to try them, each once.

        Requests may be taken out on the way, and `dispatched` told: what follows is in the order that holds then.
        """
        tried: set[str] = set()
        for _, waiting in sorted(self._classes.items(), key=lambda item: (item[1].since, item[0])):
            since = waiting.since
            if now - since < self._starve_s:
                break
            for request in self._walk(waiting):
                tried.add(request.id)
                yield request
                if waiting.since != since:  # that was its turn
                    break
        for _, waiting in sorted(self._classes.items()):
            for request in self._walk(waiting):
                if request.id not in tried:
                    yield request

    def dispatched(self, request: Request, service_s: float, *, now: float) -> None:
        """A request was sent, whether it waited or not: its class had a turn and its tenant that much service."""
        self.fairness.served(request.tenant, service_s)
        waiting = self._classes.get(rank_of(request))
        if waiting is not None:
            waiting.since = now

    def _walk(self, waiting: _Class) -> Iterator[Request]:
        """The requests of one class: again and again the next of the tenant whose tag is lowest by then."""
        tag_s = self.fairness.tag_s
        ahead: list[tuple[float, int, str, _Key | tuple[()]]] = [
            (tag_s(tenant), line.number, tenant, ()) for tenant, line in waiting.lines.items()
        ]
        heapq.heapify(ahead)
        while ahead:
            _, number, tenant, last = heapq.heappop(ahead)
            line = waiting.lines.get(tenant)
            key = line.after(last) if line is not None else None
            if key is not None:
                yield self._entries[key[2]].request
                heapq.heappush(ahead, (tag_s(tenant), number, tenant, key))

    # ---- ends of waits ----------------------------------------------------------------------------------------------

    def next_end_at(self) -> float | None:
        """The earliest instant at which some wait ends or becomes useless; None when nobody waits."""
        while self._ends and not self._is_current(self._ends[0]):
            heapq.heappop(self._ends)
        return self._ends[0][0] if self._ends else None

    def remove_ended(self, now: float) -> list[Ended]:
        """Takes out the requests whose wait is over or useless, earliest end first."""
        ended: list[Ended] = []
        while (end_at := self.next_end_at()) is not None and end_at <= now:
            _, request_id = heapq.heappop(self._ends)
            is_late = self._entries[request_id].latest_at <= now
            request = self.remove(request_id)
            assert request is not None
            ended.append(Ended(request, is_late))
        return ended

    def _is_current(self, end: tuple[float, str]) -> bool:
        end_at, request_id = end
        entry = self._entries.get(request_id)
        return entry is not None and entry.end_at == end_at

    def _sweep(self) -> None:
        """Keeps the heap of ends within twice what waits: those who left early are dropped when they are most of it."""
        if len(self._ends) > 2 * len(self._entries) + 64:
            self._ends = [end for end in self._ends if self._is_current(end)]
            heapq.heapify(self._ends)


def _take(counts: Counter[_Name], name: _Name) -> int:
    """One less of that; what is left. A count of nothing is not kept."""
    counts[name] -= 1
    left = counts[name]
    if not left:
        del counts[name]
    return left
