"""Virtual time: what is to happen, in order. Equal instants happen in the order in which they were noted down."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import TypeAlias

Action: TypeAlias = Callable[[float], None]
"""Called with the instant it was noted for."""


class Agenda:
    """A heap of actions. Nothing is ever taken off it but by its time: an action that is obsolete must know it."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Action]] = []
        self._count = 0

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def next_at(self) -> float | None:
        """When the next action is due; None when there is none."""
        return self._heap[0][0] if self._heap else None

    def note(self, at: float, action: Action) -> None:
        """Lets `action` happen at that instant."""
        heapq.heappush(self._heap, (at, self._count, action))
        self._count += 1

    def step(self) -> float:
        """Lets the next action happen; its instant."""
        at, _, action = heapq.heappop(self._heap)
        action(at)
        return at


class Alarm:
    """One action that is due at one instant at a time, or never."""

    def __init__(self, agenda: Agenda, action: Action) -> None:
        self._agenda = agenda
        self._action = action
        self._at: float | None = None

    @property
    def at(self) -> float | None:
        """When it will ring; None: never."""
        return self._at

    def set(self, at: float | None, *, now: float) -> None:
        """Moves the alarm; instants that are over mean now, None means never."""
        if at is not None:
            at = max(at, now)
        if at == self._at:
            return
        self._at = at
        if at is not None:
            self._agenda.note(at, self._ring)

    def _ring(self, now: float) -> None:
        if now == self._at:  # else it was moved since
            self._at = None
            self._action(now)
