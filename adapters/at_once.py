"""The exchange of engines that are called at once and meet by themselves: both legs open until the prefill has ended.

    open legs  what happened                       commands
    both       prefill: 200, KV handed on          Prefilled, Expect decode's first event within `hand_off_s`
    both       prefill: 200, KV not handed on      Hangup decode, Retry
    both       a failure of one leg                Hangup the other, then as in the table of endings
    any        decode: event with output           Commit; the prefill leg stays open until it ends by itself
    decode     a failure                           as in the table of endings

Each engine waits for the other, for minutes if it is gone and nobody says so: the legs are torn down together, and the
decode leg is held to a limit of ours from the moment at which the prefill's part is done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from adapters import verdict
from adapters.answers import Usage, usage
from adapters.base import Answer, Answered, Call, Command, Commit, Expect, Hangup, Happening, Leg, Prefilled, Retry
from adapters.endings import State, ended


@dataclass(slots=True)
class AtOnce:
    """One attempt on one pair. Ends in Commit, Answer or Retry, once; what happens later is ignored."""

    prefill: Call
    decode: Call
    hand_off_s: float | None
    """From the prefill's end to decode's first event; None where nothing is seen before the whole answer is there."""
    is_handed_on: Callable[[bytes], bool]
    """Whether the prefill's answer means that its KV is on its way."""
    _open: set[Leg] = field(default_factory=lambda: {Leg.PREFILL, Leg.DECODE}, init=False)

    def start(self) -> list[Command]:
        """Both calls."""
        return [self.prefill, self.decode]

    def receive(self, happening: Happening) -> list[Command]:
        """What to do now. Nothing for a leg that is not open."""
        if happening.leg not in self._open:
            return []
        commands = self._next(happening)
        if any(isinstance(command, Commit | Retry | Answer) for command in commands):
            self._open.clear()
        return commands

    def _next(self, happening: Happening) -> list[Command]:
        state = State.BOTH if Leg.PREFILL in self._open else State.DECODE
        siblings = sorted(self._open - {happening.leg})
        if happening.leg is Leg.DECODE:
            return verdict.of_answer(state, self.decode.engine, happening, siblings)
        if isinstance(happening, Answered) and happening.status == 200:
            return self._prefilled(happening.body)
        return ended(state, happening, self.prefill.engine, siblings=siblings)

    def _prefilled(self, answer: bytes) -> list[Command]:
        if not self.is_handed_on(answer):
            return [Hangup(Leg.DECODE), Retry(self.prefill.engine.id, "prefill_handed_nothing_on")]
        self._open.remove(Leg.PREFILL)
        told = usage(answer) or Usage()
        prefilled = Prefilled(told.prompt_tokens, told.cached_tokens)
        return [prefilled] if self.hand_off_s is None else [prefilled, Expect(Leg.DECODE, self.hand_off_s)]


@dataclass(frozen=True, slots=True)
class CannotHandOff:
    """The exchange of a pair about which something is not known that a hand-off needs: tried elsewhere."""

    retry: Retry

    def start(self) -> list[Command]:
        """The end."""
        return [self.retry]

    def receive(self, happening: Happening) -> list[Command]:
        """Nothing: no call was made."""
        return []
