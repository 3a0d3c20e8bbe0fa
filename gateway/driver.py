"""The live twin of the simulator: gives the scheduler the loop's time, wakes it when it asks, and keeps the journal.

Everything runs on one event loop, and between reading state and recording a decision nothing is awaited.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import structlog

from gateway.core.events import Event, Left
from gateway.core.scheduler import Scheduler
from gateway.core.types import Decision, Dispatch, Engine, Reject, Request, Wait
from gateway.journal import Journal

log = structlog.get_logger("sluice.driver")


@dataclass(frozen=True, slots=True)
class Decided:
    """A decision and what it cost."""

    decision: Dispatch | Reject
    decision_s: float
    """Time spent deciding, without the wait."""


class Driver:
    """Turns `Scheduler` into awaitable decisions."""

    def __init__(self, scheduler: Scheduler, journal: Journal, *, clock: Callable[[], float] | None = None) -> None:
        self.scheduler = scheduler
        self.journal = journal
        self._loop = asyncio.get_running_loop()
        self._clock = clock or self._loop.time
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at: float | None = None
        self._waiters: dict[str, asyncio.Future[Dispatch | Reject]] = {}

    def now(self) -> float:
        """The instant every decision and event is stamped with, seconds."""
        return self._clock()

    def engine(self, engine_id: str) -> Engine | None:
        """What is known of an engine; None when it left."""
        state = self.scheduler.cluster.engines.get(engine_id)
        return None if state is None else state.engine

    def apply(self, event: Event) -> None:
        """Tells the scheduler what happened, now."""
        now = self._clock()
        self.journal.event(event, now)
        self.scheduler.apply(event, now=now)
        for change in self.scheduler.prefixes.take_changes():
            say = log.warning if change.is_worse else log.info
            say("prefixes_known_by", engine=change.engine_id, source=change.source, reason=change.reason)
        self._arm(now)

    async def decide(self, request: Request) -> Decided:
        """The decision for this request, after its wait if it has to wait. Cancelling it gives up its place."""
        now = self._clock()
        began_s = perf_counter()
        decision = self.scheduler.decide(request, now=now)
        decision_s = perf_counter() - began_s
        self.journal.decided(request, decision, now)
        if not isinstance(decision, Wait):
            return Decided(decision, decision_s)
        waiter: asyncio.Future[Dispatch | Reject] = self._loop.create_future()
        self._waiters[request.id] = waiter
        self._arm(now)
        try:
            return Decided(await waiter, decision_s)
        except asyncio.CancelledError:
            self.apply(Left(request.id))
            raise
        finally:
            del self._waiters[request.id]

    def close(self) -> None:
        """Stops the timer. Waiting requests are left to their own cancellation."""
        if self._timer is not None:
            self._timer.cancel()

    def _arm(self, now: float) -> None:
        """One timer for the next instant the scheduler asked for. One that is set for earlier stays: if events that
        want a wake-up now put it off each time, those who wait would starve under load."""
        wake_at = self.scheduler.next_wakeup()
        if wake_at is not None and self._timer_at is not None and self._timer_at <= wake_at:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._timer_at = wake_at
        if wake_at is not None:
            self._timer = self._loop.call_later(max(0.0, wake_at - now), self._wake)

    def _wake(self) -> None:
        self._timer = self._timer_at = None
        now = self._clock()
        decisions = self.scheduler.wake(now=now)
        self.journal.woke(decisions, now)
        for decision in decisions:
            self._deliver(decision)
        self._arm(now)

    def _deliver(self, decision: Decision) -> None:
        waiter = self._waiters.get(decision.request_id)
        if waiter is None or waiter.done() or isinstance(decision, Wait):
            # The waiter was cancelled in this very turn of the loop: its `Left` is on its way and releases everything.
            return
        waiter.set_result(decision)
