"""Reservations of other gateways: leases with an owner, a fencing token and an end.

A gateway books what others sent in the same ledger as its own, under names that cannot meet its own request ids. Each
owner's reservations stand until it takes them back, stops naming them, or gives no sign for `lease_s` on *our* clock:
no clock of another machine is ever read. So a killed gateway's reservations end by time, and nothing it left can stay.

The fencing token is the owner's epoch. A gateway that was suspended, or cut off, for longer than its leases begins a
new epoch; with the first word of it the old epoch's reservations are over, and whatever is still said under the old one
(a late release, a late dispatch) counts for nothing. Numbers are counted within an epoch and never used twice.

Engines' reports count everybody's requests. One of a peer that we hear of after the report that counted it was taken
for a stranger's; when its name comes it is moved from the one to the other, so that it counts once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from gateway.core.cluster import Cluster
from gateway.core.events import PeerEvent, PeerGone, PeerHolds, PeerMoved, PeerSent, PeerStage
from gateway.core.prefixes import Prefixes
from gateway.core.types import Dispatch

MAX_OWNERS = 1024
"""Owners remembered; those without a sign for the longest are forgotten first, with all they held."""
MAX_HELD = 100_000
"""Reservations believed of one owner: more is not a gateway."""

_OVER = float("-inf")
"""The end of an owner whose time is over."""


@dataclass(slots=True)
class _Owner:
    """What is known of one gateway."""

    epoch: int
    until_at: float
    held: set[int] = field(default_factory=set)
    missing_count: int = 0
    """Of the reservations it named last, those that we do not know."""


@dataclass(slots=True)
class LeaseCounts:
    """What happened to leases since the start."""

    expired: int = 0
    """Reservations that ended by time."""
    fenced: int = 0
    """Words of an epoch that is over."""
    reconciled: int = 0
    """Reservations that ended because their owner did not name them any more."""


class Leases:
    """Books what other gateways sent in the ledger, and takes it out again."""

    def __init__(self, cluster: Cluster, prefixes: Prefixes) -> None:
        self.counts = LeaseCounts()
        self._cluster = cluster
        self._prefixes = prefixes
        self._has_room = False
        self._owners: dict[str, _Owner] = {}
        """Those heard of last at the end."""

    def __len__(self) -> int:
        """Reservations of others in the ledger."""
        return sum(len(owner.held) for owner in self._owners.values())

    @property
    def owner_count(self) -> int:
        """Other gateways that live, as far as we know."""
        return sum(owner.until_at != _OVER for owner in self._owners.values())

    def holds(self, request_id: str) -> bool:
        """Whether that name in the ledger is another gateway's."""
        return "@" in request_id

    def missing_from(self, owner_id: str) -> int:
        """Reservations that this owner named and we do not know."""
        owner = self._owners.get(owner_id)
        return 0 if owner is None else owner.missing_count

    def next_end_at(self) -> float | None:
        """When the next owner's time is over; None when there is none."""
        return min((owner.until_at for owner in self._owners.values() if owner.until_at != _OVER), default=None)

    def apply(self, event: PeerEvent, *, now: float) -> bool:
        """Takes in a word of another gateway. Whether room may have appeared on an engine."""
        self._has_room = False
        owner = self._owner(event, now)
        if owner is None:
            self.counts.fenced += 1
            return False
        match event:
            case PeerSent():
                self._sent(owner, event, now)
            case PeerMoved():
                self._moved(owner, event, now)
            case PeerHolds():
                self._holds(owner, event, now)
            case PeerGone():
                self._end(event.owner, owner, now)
        return self._has_room

    def expire(self, *, now: float) -> None:
        """Ends the reservations of owners whose time is over."""
        for owner_id, owner in self._owners.items():
            if _OVER != owner.until_at <= now:
                self.counts.expired += self._end(owner_id, owner, now)

    def _owner(self, event: PeerEvent, now: float) -> _Owner | None:
        """The owner in the epoch of this word, which becomes its present one; None when that epoch is over."""
        owner = self._owners.get(event.owner)
        if owner is not None and event.epoch < owner.epoch:
            return None
        if owner is None or event.epoch > owner.epoch:
            if owner is not None:
                self._end(event.owner, owner, now)
            owner = _Owner(event.epoch, now)
        is_new = event.owner not in self._owners or self._owners[event.owner].until_at == _OVER
        self._owners.pop(event.owner, None)
        while len(self._owners) >= MAX_OWNERS:
            oldest = next(iter(self._owners))
            self._end(oldest, self._owners[oldest], now)
            del self._owners[oldest]
        self._owners[event.owner] = owner
        if is_new and not isinstance(event, PeerGone):
            owner.until_at = now  # it lives; its words say until when
            self._tell_turns()
        return owner

    def _tell_turns(self) -> None:
        self._cluster.share_with(name for name, owner in self._owners.items() if owner.until_at != _OVER)

    def _sent(self, owner: _Owner, event: PeerSent, now: float) -> None:
        owner.until_at = now + event.lease_s
        name = _name(event.owner, event.epoch, event.number)
        if event.number in owner.held or len(owner.held) >= MAX_HELD:
            return
        owner.held.add(event.number)
        request = replace(event.request, id=name, arrived_at=now)
        self._count_once(event, now)
        self._cluster.reserve(request, Dispatch(name, 1, event.estimate), now)
        self._prefixes.sent_elsewhere(request, event.estimate.prefill, event.first_block, now=now)

    def _count_once(self, event: PeerSent, now: float) -> None:
        """Takes the request out of the strangers' of a report that was made after it was sent."""
        for engine_id in dict.fromkeys((event.estimate.prefill, event.estimate.decode)):
            state = self._cluster.engines.get(engine_id)
            if state and state.reported_at is not None and state.reported_at >= now - event.age_s:
                state.others_count = max(0, state.others_count - 1)

    def _moved(self, owner: _Owner, event: PeerMoved, now: float) -> None:
        if event.number not in owner.held:
            return
        name = _name(event.owner, event.epoch, event.number)
        match event.stage:
            case PeerStage.PREFILLED:
                self._prefixes.prefilled(name, None, now=now)
                self._end_prefill(name, now)
            case PeerStage.PRODUCING:
                self._end_prefill(name, now)
                self._cluster.progressed(name, max(1, event.output_tokens), now)
            case PeerStage.FINISHED:
                self._prefixes.prefilled(name, None, now=now)
                owner.held.discard(event.number)
                self._release(name, now)
            case PeerStage.GIVEN_UP:
                owner.held.discard(event.number)
                self._release(name, now)

    def _end_prefill(self, name: str, now: float) -> None:
        reservation = self._cluster.prefill_done(name, now)
        if reservation is None:
            return
        self._has_room = True
        if reservation.estimate.decode in self._cluster.engines:
            self._cluster.hand_off(name, reservation.estimate.decode, now)

    def _holds(self, owner: _Owner, event: PeerHolds, now: float) -> None:
        owner.until_at = now + event.lease_s
        named = set(event.numbers)
        over = sorted(owner.held - named)
        for number in over:
            self._release(_name(event.owner, event.epoch, number), now)
        owner.held &= named
        owner.missing_count = len(named) - len(owner.held)
        self.counts.reconciled += len(over)

    def _end(self, owner_id: str, owner: _Owner, now: float) -> int:
        """Ends all that the owner holds; how many that were."""
        ended = len(owner.held)
        for number in sorted(owner.held):
            self._release(_name(owner_id, owner.epoch, number), now)
        owner.held.clear()
        owner.missing_count = 0
        owner.until_at = _OVER
        self._tell_turns()
        return ended

    def _release(self, name: str, now: float) -> None:
        self._prefixes.failed(name)
        self._cluster.release(name, now)
        self._has_room = True


def _name(owner: str, epoch: int, number: int) -> str:
    """The reservation's name in the ledger. Request ids are 32 hexadecimal digits: none has an at sign."""
    return f"{number}@{owner}#{epoch}"
