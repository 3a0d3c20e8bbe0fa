"""The two-leg exchange of SGLang: both engines get the request at once and meet in a bootstrap room.

The decode engine asks the prefill engine's bootstrap server for the room, offers memory, and the prefill engine writes
the KV and the first token there. Its own answer comes when that is done; closing its connection before aborts the
transfer. Neither engine tells the other of its end: a decode engine whose prefill was aborted waits for 300 s, and so
does a prefill engine whose decode never came (seen on real engines). So the sibling is hung up by us, whatever failed,
and the next attempt has a new room.

    leg        what happened                       commands
    prefill    200                                 Prefilled; a stream has to begin within `decode_within_s`
    decode     event that only names the role      nothing yet
    decode     event with output                   Commit, whether the prefill leg has answered or not
    decode     whole answer                        Answer
    either     a failure                           as in the table of endings; the other leg is hung up

Each engine tells of the other's failure too: the decode engine says that handshake or transfer failed when the prefill
engine died or moved, the prefill engine that bootstrap or transfer failed when the decode engine did. What these name
decides which engine is avoided. When both legs are silent until the time of one is over, both engines are.

Source: sglang 0.5.23, disaggregation/{prefill,decode}.py, disaggregation/common/conn.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final

from adapters import verdict
from adapters.answers import Usage, usage
from adapters.base import (
    Answer,
    Answered,
    Broken,
    Call,
    Cause,
    Command,
    Commit,
    Expect,
    Happening,
    HeadEvent,
    Leg,
    Payload,
    Prefilled,
    Retry,
)
from adapters.endings import State, ended
from adapters.sglang import bodies
from gateway.core.types import Engine

SIBLING_FAILED: Final = {
    Leg.PREFILL: (b"Prefill bootstrap failed", b"Prefill transfer failed"),
    Leg.DECODE: (b"Decode handshake failed", b"Decode transfer failed"),
}
"""What a leg says when the engine at its other end was lost."""
SIBLING: Final = {Leg.PREFILL: Leg.DECODE, Leg.DECODE: Leg.PREFILL}


@dataclass(slots=True)
class Pair:
    """One attempt on one pair. Ends in Commit, Answer or Retry, once; what happens later is ignored."""

    payload: Payload
    prefill: Engine
    decode: Engine
    rid: str
    room: int
    decode_within_s: float
    _open: set[Leg] = field(default_factory=lambda: {Leg.PREFILL, Leg.DECODE}, init=False)

    def start(self) -> list[Command]:
        """Both calls: neither engine goes on before it has met the other."""
        room = bodies.bootstrap(self.prefill, self.room)
        return [
            self._call(Leg.PREFILL, self.prefill, bodies.prefill(self.payload, self.prefill, self.rid, room)),
            self._call(Leg.DECODE, self.decode, bodies.decode(self.payload, self.decode, self.rid, room)),
        ]

    def receive(self, happening: Happening) -> list[Command]:
        """What to do now. Nothing for a leg that is not open."""
        if happening.leg not in self._open:
            return []
        commands = self._with_suspect(happening, self._next(happening))
        if any(isinstance(command, Commit | Retry | Answer) for command in commands):
            self._open.clear()
        return commands

    def _next(self, happening: Happening) -> list[Command]:
        sibling = SIBLING[happening.leg]
        siblings = [sibling] if sibling in self._open else []
        if happening.leg is Leg.DECODE:
            return verdict.of_answer(State.BOTH, self._at_fault(happening), happening, siblings)
        if isinstance(happening, Answered) and happening.status == 200:
            return self._prefilled(happening.body)
        return ended(State.BOTH, happening, self._at_fault(happening), siblings=siblings)

    def _with_suspect(self, happening: Happening, commands: list[Command]) -> list[Command]:
        """Of two legs that wait for one another, the one whose time is over first need not be the one at fault."""
        if not isinstance(happening, Broken) or happening.cause is not Cause.HEAD_TIMEOUT or len(self._open) == 1:
            return commands
        other = self.decode if happening.leg is Leg.PREFILL else self.prefill
        return [replace(each, suspects=(other.id,)) if isinstance(each, Retry) else each for each in commands]

    def _prefilled(self, answer: bytes) -> list[Command]:
        self._open.discard(Leg.PREFILL)
        told = usage(answer) or Usage()
        # A whole answer shows nothing before all of it is generated; its time is the shell's own limit for answers.
        expected = [Expect(Leg.DECODE, self.decode_within_s)] if self.payload.is_stream else []
        return [Prefilled(told.prompt_tokens, told.cached_tokens), *expected]

    def _at_fault(self, happening: Happening) -> Engine:
        """The engine at the other end where this leg says that it was lost, else this leg's own."""
        own, other = self.prefill, self.decode
        if happening.leg is Leg.DECODE:
            own, other = other, own
        match happening:
            case Answered(body=said) | HeadEvent(data=said):
                return other if any(text in said for text in SIBLING_FAILED[happening.leg]) else own
        return own

    def _call(self, leg: Leg, engine: Engine, body: bytes) -> Call:
        headers = verdict.leg_headers(self.payload)
        is_answer = leg is Leg.DECODE
        # Never sent again by the shell: the engine may have taken the room already.
        return Call(
            *(leg, engine, self.payload.path, body, headers),
            is_answer=is_answer,
            is_replayable=False,
            abort=bodies.abort(self.rid),
        )
