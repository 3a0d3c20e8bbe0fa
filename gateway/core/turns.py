"""Which of several gateways may send first to an engine that becomes free.

Every gateway has a queue of its own and sees a prefill engine become free at nearly the same instant. If all of them
sent then, one engine would get as many prefills as there are gateways, each predicted to begin at once. So the vacancy
is offered to them one after the other, again and again until one sends: each has a turn of `turn_s`, and sends in the
first half of it only, so that its word is with the next before the next's turn begins. Nobody asks anybody: who is
first follows from the requests that were sent to that engine last, which all of them know within the delay of the
view, whatever the order in which they heard of them. Where two disagree for a moment (a word is on its way, a member
just came or left) the worst is what would happen without turns. A gateway that is alone always has its turn.

An engine that has been idle for long is another matter: nobody waits for it, so whoever comes need not wait for a
turn. But bursts come to all gateways at once, and all would choose the same engine. So an arrival begins an offer of
the idle engines: those of which this gateway is the first it may take at once, the others a turn later each.

`turn_s` is to be longer than a word takes from one gateway to another. It is the price of a vacancy whose first has
nobody waiting, and of an idle engine of another's for which an arrival waits.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from zlib import crc32

IDLE_S = 0.5
"""An engine that is free for longer is idle: those who wait looked at it several times."""


class Turns:
    """The gateways that share the engines, and when this one may send."""

    def __init__(self) -> None:
        """Alone."""
        self.own = ""
        self.turn_s = 0.0
        self.is_arrival = False
        """Whether what is decided now came just now; else it has waited."""
        self._members: tuple[str, ...] = ("",)
        self._offered_at = -inf
        """Since when idle engines are offered."""

    @property
    def member_count(self) -> int:
        """Gateways that share the engines, this one included; >= 1."""
        return len(self._members)

    @property
    def round_s(self) -> float:
        """Seconds until everybody had a turn; 0 where nobody waits for one."""
        return self.turn_s * len(self._members) if len(self._members) > 1 else 0.0

    def join(self, own: str, turn_s: float) -> None:
        """Goes by that name among others from now on, with turns of `turn_s` >= 0 seconds; 0: there are none."""
        self._members = tuple(sorted({*self._members} - {self.own} | {own}))
        self.own, self.turn_s = own, turn_s

    def found(self, others: Iterable[str]) -> bool:
        """Learns who else is there; whether that was news."""
        members = tuple(sorted({self.own, *others}))
        is_news = members != self._members
        self._members = members
        return is_news

    def arrived(self, now: float) -> None:
        """Somebody came, and is decided next: the idle engines are offered anew, unless an offer is under way."""
        self.is_arrival = True
        if now >= self._offered_at + self.round_s:
            self._offered_at = now

    def mark(self, owner: str, prompt_tokens: int) -> int:
        """What a request of that gateway adds to the lot of its engine's next vacancy; "" is this gateway."""
        return crc32(f"{owner or self.own}:{prompt_tokens}".encode())

    def delay_s(self, engine_id: str, marks: int) -> float:
        """How long after the engine's next vacancy this gateway's first turn begins, seconds, 0 <= delay < round.

        `marks` is the sum of the marks of the requests that were sent there last.
        """
        count = len(self._members)
        first = crc32(f"{engine_id}:{marks}".encode()) % count
        return (self._members.index(self.own) - first) % count * self.turn_s

    def in_s(self, delay_s: float, opens_s: float, *, is_idle: bool, now: float) -> float:
        """Seconds until this gateway may send to an engine that opens in `opens_s`, or did so long ago; 0: it may now.

        `delay_s` is what the method of that name said for this vacancy; `is_idle`: it is open for long.
        """
        round_s = self.round_s
        if round_s == 0.0:
            return max(0.0, opens_s)
        if self.is_arrival and is_idle:
            return max(0.0, self._offered_at + delay_s - now)
        if opens_s == -inf:  # nothing was ever sent there
            return 0.0
        begins_s = opens_s + delay_s
        if begins_s > 0.0:
            return begins_s
        into_s = -begins_s % round_s
        return 0.0 if into_s < self.turn_s / 2 else round_s - into_s
