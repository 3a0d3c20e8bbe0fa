"""The live twin of the simulator: gives the scheduler the loop's time, wakes it when it asks, and keeps the journal.

Everything runs on one event loop, and between reading state and recording a decision nothing is awaited.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

import structlog

from gateway.core.events import Event, Left, PrefillDone
from gateway.core.scheduler import Scheduler
from gateway.core.types import Decision, Dispatch, Engine, Estimate, HandOff, Health, Reject, Request, Wait
from gateway.journal import Journal
from gateway.records import KEPT_CANDIDATES, Recorder

log = structlog.get_logger("sluice.driver")


@dataclass(frozen=True, slots=True)
class Decided:
    """A decision and what it cost."""

    decision: Dispatch | Reject
    decision_s: float
    """Time spent deciding, without the wait."""
    waited_s: float = 0.0
    """From the request's arrival to the decision, earlier attempts and the wait included."""


class Listener(Protocol):
    """Hears what this gateway does, to tell other gateways. Never waits, never fails."""

    def sent(self, request: Request, estimate: Estimate, *, now: float) -> None:
        """A request was dispatched."""
        ...

    def told(self, event: Event, *, now: float) -> None:
        """Something happened, and the scheduler knows."""
        ...

    def ended(self, request_id: str, *, is_finished: bool, now: float) -> None:
        """A request holds nothing any more."""
        ...


class Driver:
    """Turns `Scheduler` into awaitable decisions."""

    def __init__(
        self,
        scheduler: Scheduler,
        journal: Journal,
        *,
        clock: Callable[[], float] | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.journal = journal
        self.listener: Listener | None = None
        """Who tells other gateways; None: there are none."""
        self.recorder = recorder or Recorder(kept_count=1)
        self.scheduler.kept_candidates = KEPT_CANDIDATES if recorder else 0
        self._loop = asyncio.get_running_loop()
        self._clock = clock or self._loop.time
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at: float | None = None
        self._waiters: dict[str, asyncio.Future[Dispatch | Reject | HandOff]] = {}

    def now(self) -> float:
        """The instant every decision and event is stamped with, seconds."""
        return self._clock()

    def engine(self, engine_id: str) -> Engine | None:
        """What is known of an engine; None when it left."""
        state = self.scheduler.cluster.engines.get(engine_id)
        return None if state is None else state.engine

    def down_reason(self, engine_id: str) -> str | None:
        """Why no answer is expected of an engine; None where one is."""
        state = self.scheduler.cluster.engines.get(engine_id)
        if state is None:
            return "the engine left"
        return state.health_reason if state.health is Health.DOWN else None

    def adapter_name(self, engine_id: str) -> str | None:
        """Which kind of engine it is; None when it left. May be asked from any thread."""
        state = self.scheduler.cluster.engines.get(engine_id)
        return None if state is None else state.engine.adapter

    def apply(self, event: Event) -> None:
        """Tells the scheduler what happened, now."""
        now = self._clock()
        self.journal.event(event, now)
        self.scheduler.apply(event, now=now)
        self.recorder.event(event, now=now)
        if self.listener is not None:
            self.listener.told(event, now=now)
        self._announce_changes()
        self._arm(now)

    def follow(self, events: Iterable[Event]) -> None:
        """Tells the scheduler what other gateways did or heard, now."""
        now = self._clock()
        for event in events:
            self.journal.event(event, now)
            self.scheduler.apply(event, now=now)
        self._announce_changes()
        self._arm(now)

    async def decide(self, request: Request) -> Decided:
        """The decision for this request, after its wait if it has to wait. Cancelling it gives up its place."""
        now = self._clock()
        began_s = perf_counter()
        decision = self.scheduler.decide(request, now=now)
        decision_s = perf_counter() - began_s
        self.journal.decided(request, decision, now)
        self._tell(request, decision, now)
        candidates = self.scheduler.candidates.get(request.id)
        self.recorder.decided(decision, candidates, attempt=request.attempt, decision_s=decision_s, now=now)
        if not isinstance(decision, Wait):
            return Decided(decision, decision_s, now - request.arrived_at)
        waiter: asyncio.Future[Dispatch | Reject | HandOff] = self._loop.create_future()
        self._waiters[request.id] = waiter
        self._arm(now)
        try:
            decided = await waiter
            assert not isinstance(decided, HandOff), "nothing was sent yet"
            return Decided(decided, decision_s, self._clock() - request.arrived_at)
        except asyncio.CancelledError:
            self.apply(Left(request.id))
            raise
        finally:
            del self._waiters[request.id]

    async def prefilled(self, event: PrefillDone) -> HandOff | Reject | None:
        """Tells that a prefill is done and waits to be told where it decodes; None: as it was dispatched.

        Cancelling it gives up the wait and nothing else: whoever cancels says what became of the request.
        """
        waiter: asyncio.Future[Dispatch | Reject | HandOff] = self._loop.create_future()
        self._waiters[event.request_id] = waiter
        try:
            self.apply(event)
            if not self.scheduler.is_between(event.request_id):
                return None
            decided = await waiter
            assert not isinstance(decided, Dispatch), "it was dispatched before"
            return decided
        finally:
            del self._waiters[event.request_id]

    def _announce_changes(self) -> None:
        for change in self.scheduler.prefixes.take_changes():
            say = log.warning if change.is_worse else log.info
            say("prefixes_known_by", engine=change.engine_id, source=change.source, reason=change.reason)

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
        self.recorder.woke(decisions, self.scheduler.candidates, now=now)
        for decision in decisions:
            reservation = self.scheduler.cluster.reservations.get(decision.request_id)
            self._tell(None if reservation is None else reservation.request, decision, now)
            self._deliver(decision)
        self._arm(now)

    def _tell(self, request: Request | None, decision: Decision, now: float) -> None:
        """A dispatch, or a refusal of a request that had been dispatched, goes to the other gateways."""
        if self.listener is None:
            return
        if isinstance(decision, Dispatch) and request is not None:
            self.listener.sent(request, decision.estimate, now=now)
        elif isinstance(decision, Reject):
            self.listener.ended(decision.request_id, is_finished=False, now=now)

    def _deliver(self, decision: Decision) -> None:
        waiter = self._waiters.get(decision.request_id)
        if waiter is None or waiter.done() or isinstance(decision, Wait):
            # The waiter was cancelled in this very turn of the loop: its `Left` is on its way and releases everything.
            return
        waiter.set_result(decision)
