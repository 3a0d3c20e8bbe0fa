"""Lets the faults of a plan happen to the engines of a simulation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Protocol

from gateway.core.events import BlocksCleared, EngineHealth, Event
from gateway.core.types import Health
from loadtest.agenda import Agenda
from loadtest.fault_plan import Fault, FaultKind
from loadtest.links import Links
from loadtest.sim_engines import SimEngine


class World(Protocol):
    """What a fault does beyond its engine."""

    def fail_all(self, engine: SimEngine, now: float) -> None: ...

    def tell_all(self, event: Event, now: float) -> None: ...


class Faults:
    """Begins and ends each fault at its time. Faults of one kind on one engine should not overlap: one end ends all."""

    def __init__(
        self, faults: Iterable[Fault], agenda: Agenda, engines: Mapping[str, SimEngine], links: Links, world: World
    ) -> None:
        self._engines = engines
        self._links = links
        self._world = world
        for fault in faults:
            agenda.note(fault.at_s, partial(self._set, fault, True))
            agenda.note(fault.at_s + fault.duration_s, partial(self._set, fault, False))

    def _set(self, fault: Fault, is_on: bool, now: float) -> None:
        engine = self._engines[fault.engine_id]
        factor = fault.factor if is_on else 1.0
        match fault.kind:
            case FaultKind.DIES if is_on:
                self._kill(engine, now)
            case FaultKind.DIES:
                self._revive(engine, now)
            case FaultKind.SLOWS:
                engine.times.factor = factor
            case FaultKind.LIES:
                engine.lie_factor = factor
            case FaultKind.SILENT:
                engine.is_silent = is_on
            case FaultKind.LINK_SLOWS:
                self._links.slow_down(engine.id, factor, now=now)

    def _kill(self, engine: SimEngine, now: float) -> None:
        if engine.model is not None:
            engine.die()
            self._world.tell_all(EngineHealth(engine.id, Health.DOWN, "it died"), now)
            self._world.fail_all(engine, now)

    def _revive(self, engine: SimEngine, now: float) -> None:
        if engine.model is None:
            engine.start()
            self._world.tell_all(BlocksCleared(engine.id), now)
            self._world.tell_all(EngineHealth(engine.id, Health.UP), now)
