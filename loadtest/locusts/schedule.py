"""The requests of a replay as the users of one Locust process share them: each is taken once, in order, when due.

The users are slots: one that is free takes the next request and sleeps until its instant. So the load is open loop as
long as a user is free, and when none is, the request leaves late and its lag is reported, as in `sluice replay`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import gevent

from loadtest.client import ClientRequest
from loadtest.locusts.stream import clock
from loadtest.replay import Target, client_requests
from loadtest.workload import TraceRequest

LEAD_S = 0.5
"""From the first user's first look to the start: the others are spawned meanwhile."""


@dataclass(frozen=True, slots=True)
class Share:
    """Which part of a workload one process replays: every `count`-th request, beginning with `index`."""

    index: int = 0
    count: int = 1


class Schedule:
    """What one process sends, in order."""

    def __init__(self, workload: Sequence[TraceRequest], target: Target, share: Share) -> None:
        # Made whole and then divided, so that a prompt does not depend on how many processes share the replay.
        self._requests = _own(client_requests(workload, target), share)
        self._began_at: float | None = None

    def next(self) -> tuple[ClientRequest, float] | None:
        """The next request and the instant it was due, at that instant; None when there are no more."""
        if self._began_at is None:
            self._began_at = clock() + LEAD_S
        request = next(self._requests, None)
        if request is None:
            return None
        due_at = self._began_at + request.due_s
        gevent.sleep(max(0.0, due_at - clock()))
        return request, due_at


def _own(requests: Iterator[ClientRequest], share: Share) -> Iterator[ClientRequest]:
    return (request for number, request in enumerate(requests) if number % share.count == share.index)
