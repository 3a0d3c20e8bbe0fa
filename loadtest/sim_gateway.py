"""A gateway of a simulation: the twin of gateway/driver.py, which makes the same calls at the same instants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from gateway.core.events import Event
from gateway.core.scheduler import Scheduler
from gateway.core.types import Decision, Dispatch, HandOff, Reject, Request, Wait
from gateway.journal import Journal
from loadtest.agenda import Agenda, Alarm


class GatewayShell(Protocol):
    """What the simulation asks of a gateway; decisions come back through the callback given when it was made."""

    scheduler: Scheduler

    def decide(self, request: Request, *, now: float) -> None:
        """A request arrived, or is to be tried again."""
        ...

    def apply(self, event: Event, *, now: float) -> None:
        """Something happened."""
        ...

    def settle(self, *, now: float) -> None:
        """Makes decisions that are due at this very instant."""
        ...


OnDecision = Callable[[Dispatch | Reject | HandOff, float], None]
ShellOf = Callable[[Scheduler, Agenda, OnDecision], GatewayShell]


class SimGateway:
    """A scheduler with its alarm and its journal."""

    def __init__(
        self, scheduler: Scheduler, agenda: Agenda, on_decision: OnDecision, journal: Journal | None = None
    ) -> None:
        self.scheduler = scheduler
        self._journal = journal or Journal()
        self._on_decision = on_decision
        self._alarm = Alarm(agenda, self._wake)

    def decide(self, request: Request, *, now: float) -> None:
        """The decision for this request, at once or after its wait."""
        decision = self.scheduler.decide(request, now=now)
        self._journal.decided(request, decision, now)
        self._arm(now)
        self._deliver(decision, now)

    def apply(self, event: Event, *, now: float) -> None:
        """Tells the scheduler what happened."""
        self._journal.event(event, now)
        self.scheduler.apply(event, now=now)
        self._arm(now)

    def settle(self, *, now: float) -> None:
        """Wakes the scheduler if that is due now."""
        wake_at = self.scheduler.next_wakeup()
        if wake_at is not None and wake_at <= now:
            self._alarm.set(None, now=now)
            self._wake(now)

    def _arm(self, now: float) -> None:
        """As the live driver: an alarm that is set for earlier stays."""
        wake_at = self.scheduler.next_wakeup()
        if wake_at is None or self._alarm.at is None or self._alarm.at > wake_at:
            self._alarm.set(wake_at, now=now)

    def _wake(self, now: float) -> None:
        decisions = self.scheduler.wake(now=now)
        self._journal.woke(decisions, now)
        self._arm(now)
        for decision in decisions:
            self._deliver(decision, now)

    def _deliver(self, decision: Decision, now: float) -> None:
        if not isinstance(decision, Wait):
            self._on_decision(decision, now)
