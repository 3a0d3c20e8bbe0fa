"""The one-leg exchange: one engine prefills and decodes, and the request travels as the client wrote it."""

from __future__ import annotations

from dataclasses import dataclass, field

from adapters import verdict
from adapters.base import Call, Command, Happening, Leg, Payload
from adapters.endings import State
from adapters.vllm import bodies
from gateway.core.types import Engine


@dataclass(slots=True)
class Single:
    """One attempt on one engine. Ends in Commit, Answer or Retry, once; what happens later is ignored."""

    payload: Payload
    engine: Engine
    _is_over: bool = field(default=False, init=False)

    def start(self) -> list[Command]:
        """The only call."""
        body, headers = bodies.encode(self.payload, self.payload.body), verdict.leg_headers(self.payload)
        return [Call(Leg.DECODE, self.engine, self.payload.path, body, headers, is_answer=True)]

    def receive(self, happening: Happening) -> list[Command]:
        """What the engine's answer, events or silence means."""
        if self._is_over or happening.leg is not Leg.DECODE:
            return []
        commands = verdict.of_answer(State.ALONE, self.engine, happening)
        self._is_over = bool(commands)
        return commands
