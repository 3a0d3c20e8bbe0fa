"""The bounded queue in front of prefill: requests that no engine has room for now, in the order they arrived."""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Iterator

from gateway.core.types import Request


class WaitingQueue:
    """Requests in order of arrival (ties by id), each with the instant its wait ends. At most `limit` of them."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._order: list[tuple[float, str]] = []
        self._requests: dict[str, tuple[Request, float]] = {}
        self._ends: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def __iter__(self) -> Iterator[Request]:
        """The waiting requests, first arrived first; safe against removal on the way."""
        return iter([self._requests[request_id][0] for _, request_id in self._order])

    @property
    def is_full(self) -> bool:
        return len(self._requests) >= self.limit

    def add(self, request: Request, until_at: float) -> None:
        """Appends a request that waits until that instant at most. It must not be waiting already."""
        assert request.id not in self._requests, f"request {request.id} waits twice"
        assert not self.is_full, "the waiting queue is over its bound"
        insort(self._order, (request.arrived_at, request.id))
        self._requests[request.id] = request, until_at
        heapq.heappush(self._ends, (until_at, request.id))

    def remove(self, request_id: str) -> Request | None:
        """Takes a request out. None when it does not wait."""
        entry = self._requests.pop(request_id, None)
        if entry is None:
            return None
        self._order.remove((entry[0].arrived_at, request_id))
        return entry[0]

    def next_end_at(self) -> float | None:
        """The earliest instant at which some wait ends; None when nobody waits."""
        while self._ends and not self._is_current(self._ends[0]):
            heapq.heappop(self._ends)
        return self._ends[0][0] if self._ends else None

    def remove_ended(self, now: float) -> list[Request]:
        """Takes out the requests whose wait is over, earliest end first."""
        ended: list[Request] = []
        while (end_at := self.next_end_at()) is not None and end_at <= now:
            _, request_id = heapq.heappop(self._ends)
            request = self.remove(request_id)
            assert request is not None
            ended.append(request)
        return ended

    def _is_current(self, end: tuple[float, str]) -> bool:
        until_at, request_id = end
        entry = self._requests.get(request_id)
        return entry is not None and entry[1] == until_at
