"""The exchange of connectors whose legs go one after the other: prefill one token, then decode with what it answered.

    open leg   what happened                       commands
    prefill    200 with sound parameters           Prefilled, Call decode with them
    prefill    200 without parameters              Prefilled, Call decode plainly (it prefills), or Retry if it cannot
    prefill    200 with unsound ones               Retry: a decode engine could die of them
    decode     event that only names the role      nothing yet
    decode     event with output                   Commit
    decode     whole answer                        Answer
    either     a failure                           as in the table of endings

A request queued in the gateway between the legs would let a lease run down, for only a decode engine that has the
request renews it: the decode call follows at once, and its engine must show a head within `lease_s`. Parameters can be
read once, so they never outlive this attempt: whatever fails after the prefill is prefilled anew by the next one (cheap
on the same engine: its prefix cache helps).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from adapters import verdict
from adapters.answers import Usage, usage
from adapters.base import (
    Answer,
    Answered,
    Call,
    Command,
    Commit,
    Happening,
    Leg,
    Payload,
    Prefilled,
    Retry,
)
from adapters.endings import State, ended
from adapters.vllm import bodies
from gateway.core.errors import MalformedEngineData
from gateway.core.types import Engine


@dataclass(frozen=True, slots=True)
class Transfer:
    """What a prefill answer says about its blocks."""

    params: msgspec.Raw
    """The transfer parameters, byte for byte as they came."""
    cached_tokens: int | None
    is_pushed: bool = False
    """The prefill engine writes: without it the decode engine waits, for minutes."""


class HandOver(Protocol):
    """What one connector wants said on the legs."""

    @property
    def ends_by_length(self) -> bool:
        """Whether a prefill that ends for another reason than its length hands nothing on."""
        ...

    @property
    def lease_s(self) -> float | None:
        """How long after the prefill its engine may be sure to keep the blocks; None: nothing is kept for this one."""
        ...

    def asks(self, payload: Payload) -> dict[str, object] | None:
        """The prefill leg's transfer parameters."""
        ...

    def transfer(self, answer: bytes) -> Transfer | None:
        """What the prefill's answer offers; None: nothing. Raises MalformedEngineData when it could do harm."""
        ...


@dataclass(slots=True)
class InTurn:
    """One attempt on one pair. Ends in Commit, Answer or Retry, once; what happens later is ignored."""

    payload: Payload
    prefill: Engine
    decode: Engine
    hand_over: HandOver
    _open: Leg | None = field(default=Leg.PREFILL, init=False)

    def start(self) -> list[Command]:
        """The prefill call."""
        asks = self.hand_over.asks(self.payload)
        body = bodies.prefill(self.payload, asks, ends_by_length=self.hand_over.ends_by_length)
        return [Call(Leg.PREFILL, self.prefill, self.payload.path, body, verdict.leg_headers(self.payload))]

    def receive(self, happening: Happening) -> list[Command]:
        """What to do now. Nothing for a leg that is not open."""
        if happening.leg is not self._open:
            return []
        commands = self._next(happening)
        if any(isinstance(command, Commit | Retry | Answer) for command in commands):
            self._open = None
        return commands

    def _next(self, happening: Happening) -> list[Command]:
        if happening.leg is Leg.DECODE:
            return verdict.of_answer(State.DECODE, self.decode, happening)
        if isinstance(happening, Answered) and happening.status == 200:
            return self._prefilled(happening.body)
        return ended(State.PREFILL, happening, self.prefill)

    def _prefilled(self, answer: bytes) -> list[Command]:
        try:
            transfer = self.hand_over.transfer(answer)
        except MalformedEngineData:
            return [Retry(self.prefill.id, "prefill_bad_parameters")]
        if transfer is None and not self.decode.can_serve_alone:
            return [Retry(self.prefill.id, "prefill_no_parameters")]
        self._open = Leg.DECODE
        told = usage(answer) or Usage()
        # Only some engines are started to tell cached tokens in `usage`; the transfer parameters always do.
        cached_tokens = told.cached_tokens if transfer is None else transfer.cached_tokens
        return [Prefilled(told.prompt_tokens, cached_tokens), self._decode_call(transfer)]

    def _decode_call(self, transfer: Transfer | None) -> Call:
        is_leased = transfer is not None and self.hand_over.lease_s is not None
        is_pushed = transfer is not None and transfer.is_pushed
        return Call(
            Leg.DECODE,
            self.decode,
            self.payload.path,
            bodies.encode(self.payload, self.payload.body, bodies.NO_TRANSFER if transfer is None else transfer.params),
            verdict.leg_headers(self.payload),
            is_answer=True,
            is_replayable=not is_leased,
            # A stream's head comes when the engine has the request; a whole answer's head only when all is generated.
            head_within_s=self.hand_over.lease_s if is_leased and self.payload.is_stream else None,
            first_event_within_s=self.hand_over.lease_s if is_pushed and self.payload.is_stream else None,
            waits_for=self.prefill.id if is_pushed else None,
        )
