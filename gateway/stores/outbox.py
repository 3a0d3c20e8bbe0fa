"""What this gateway has to tell the others, until it is sent: bounded, and pure.

It watches the driver: dispatches, ends and block events in, messages out. Nothing here waits, and nothing grows: when
the others cannot be told fast enough (a store that is slow, or away) what waits is thrown away and counted, and as soon
as telling works again the whole truth is told anew under the next epoch, which voids everything said before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from gateway.core.cluster import Reservation
from gateway.core.events import (
    AttemptFailed,
    BlocksCleared,
    BlocksRemoved,
    BlocksStored,
    Event,
    Finished,
    FirstToken,
    KvFeed,
    Left,
    PrefillDone,
    Progress,
)
from gateway.core.prefixes import PrefixSource
from gateway.core.scheduler import Scheduler
from gateway.core.types import Estimate, Request
from gateway.stores.codec import (
    MAX_MESSAGE_BYTES,
    Ask,
    BlocksEvent,
    Cleared,
    Ended,
    Feed,
    Gone,
    Held,
    LedgerEvent,
    Message,
    Prefilled,
    Producing,
    Removed,
    Sent,
    Stored,
    WireEvent,
    packed,
    shard_of,
    steps,
)

MICROSECONDS = 1_000_000
EVENT_BYTES = 128
"""Taken for an event without its hashes; a dispatch has about 100."""
FULL_MESSAGE_BYTES = MAX_MESSAGE_BYTES // 2
CHUNK_BLOCKS = 4096
"""Blocks per event: 32 KB, applied in about half a millisecond."""
MAX_HELD_BYTES = 32 * 2**20
"""Of block hashes that wait: four million blocks."""
MAX_PROMPT_BLOCKS = 8192
"""Of a longer prompt the others learn so many blocks at its dispatch, 64 KB."""


@dataclass(frozen=True, slots=True)
class Letter:
    """A message and the shard it goes to."""

    shard: int
    message: Message


class Outbox:
    """Collects what others should know, and cuts it into messages."""

    def __init__(self, member: str, scheduler: Scheduler, *, shard_count: int, lease_s: float, max_events: int) -> None:
        """At most `max_events` >= 1 wait."""
        self.member = member
        self.epoch = 1
        self.dropped_count = 0
        """Events thrown away, since the start, because the others could not be told."""
        self.lapsed_count = 0
        """How often this gateway was silent for longer than its leases."""
        self.has_lost_blocks = False
        """Whether block changes were thrown away that nobody has told since."""
        self._scheduler = scheduler
        self._shard_count = shard_count
        self._lease_s = lease_s
        self._max_events = max_events
        self._next_number = 1
        self._numbers: dict[str, int] = {}
        """Our requests that hold a reservation -> its number."""
        self._ledger: deque[LedgerEvent] = deque()
        self._blocks: deque[BlocksEvent] = deque()
        self._has_lost_ledger = False
        self._held_bytes = 0
        """Of block hashes that wait."""
        self._since: float | None = None
        """Since when the first event waits."""
        self._renewed_at: float | None = None
        self._sequences: dict[int, int] = {}
        self._tokens: dict[str, int] = {}
        """Engines that this gateway listens to for all -> its fencing token."""
        self._engine_of_row: dict[str, str] = {}

    def __len__(self) -> int:
        """Events that wait."""
        return len(self._ledger) + len(self._blocks)

    @property
    def held_count(self) -> int:
        """Our reservations."""
        return len(self._numbers)

    # ---- what happens here ------------------------------------------------------------------------------------------

    def sent(self, request: Request, estimate: Estimate, *, now: float) -> None:
        """This gateway dispatched a request."""
        number = self._numbers[request.id] = self._next_number
        self._next_number += 1
        self._say(self._sent(number, request, estimate), now)

    def told(self, event: Event, *, now: float) -> None:
        """Something happened to a request of this gateway, or an engine announced something to it."""
        match event:
            case PrefillDone(request_id) if request_id in self._numbers:
                self._say(Prefilled(self._numbers[request_id]), now)
            case FirstToken(request_id) if request_id in self._numbers:
                self._say(Producing(self._numbers[request_id], 1), now)
            case Progress(request_id, output_tokens) if request_id in self._numbers:
                self._say(Producing(self._numbers[request_id], output_tokens), now)
            case Finished(request_id):
                self.ended(request_id, is_finished=True, now=now)
            case AttemptFailed(request_id) | Left(request_id):
                self.ended(request_id, is_finished=False, now=now)
            case KvFeed() | BlocksStored() | BlocksRemoved() | BlocksCleared():
                self._heard(event, now)

    def ended(self, request_id: str, *, is_finished: bool, now: float) -> None:
        """A reservation of this gateway is over, if there was one."""
        number = self._numbers.pop(request_id, None)
        if number is not None:
            self._say(Ended(number, is_finished), now)

    def _sent(self, number: int, request: Request, estimate: Estimate, *, age_s: float | None = None) -> Sent:
        """The dispatch as others hear it; with an age it is told again, without its blocks."""
        size, first_block, hashes = self._blocks_of(request, estimate) if age_s is None else (0, 0, b"")
        return Sent(
            number=number,
            age_us=_us(age_s or 0.0),
            prefill=estimate.prefill,
            decode=estimate.decode,
            prompt_tokens=request.prompt_tokens,
            cached_tokens=estimate.cached_tokens,
            wait_us=_us(estimate.wait_s),
            fetch_us=_us(estimate.fetch_s),
            prefill_us=_us(estimate.prefill_s),
            hand_off_us=_us(estimate.hand_off_s),
            join_us=_us(estimate.join_s),
            tbt_us=_us(estimate.tbt_s),
            max_output_tokens=request.max_output_tokens,
            fetch_from=estimate.fetch_from,
            fetched_tokens=estimate.fetched_tokens,
            stall_us=_us(estimate.stall_s),
            model=request.model[:512],
            tenant=request.tenant[:512],
            priority=request.priority,
            block_tokens=size,
            first_block=first_block,
            hashes=hashes,
        )

    def _blocks_of(self, request: Request, estimate: Estimate) -> tuple[int, int, bytes]:
        """Block size, first block and hashes that others need to know where this prompt will be cached.

        Of an engine that announces its blocks they know the cached ones; the model of one that does not has to hear
        which of them were used again.
        """
        engine_id = estimate.prefill
        state = self._scheduler.cluster.engines.get(engine_id)
        size = (state.engine.block_tokens if state else None) or 0
        hashes = request.block_hashes.get(size)
        if hashes is None:
            return 0, 0, b""
        is_announced = self._scheduler.prefixes.source(engine_id) is PrefixSource.EVENTS
        first = estimate.held_tokens // size if is_announced else 0
        return size, first, packed(hashes[first : first + MAX_PROMPT_BLOCKS])

    # ---- listening for all ------------------------------------------------------------------------------------------

    def listens(self, engine_id: str, token: int | None) -> None:
        """From now on this gateway listens to the engine's block events for all, or (None) does not."""
        if token is None:
            self._tokens.pop(engine_id, None)
        else:
            self._tokens[engine_id] = token

    def _heard(self, event: KvFeed | BlocksStored | BlocksRemoved | BlocksCleared, now: float) -> None:
        if isinstance(event, KvFeed):
            self._engine_of_row.update(dict.fromkeys(event.rows, event.engine_id))
        engine_id = self._engine_of_row.get(event.engine_id, event.engine_id)
        token = self._tokens.get(engine_id)
        if token is None:
            return
        match event:
            case KvFeed(_, state, rows):
                self._say_blocks(Feed(engine_id, token, state, rows), now)
            case BlocksCleared(row):
                self._say_blocks(Cleared(engine_id, token, row), now)
            case BlocksStored() | BlocksRemoved():
                kind = Stored if isinstance(event, BlocksStored) else Removed
                for first in range(0, len(event.hashes), CHUNK_BLOCKS):
                    part = packed(event.hashes[first : first + CHUNK_BLOCKS])
                    self._say_blocks(kind(engine_id, token, event.engine_id, event.block_tokens, event.tier, part), now)

    def restate_blocks(self, events: Iterable[KvFeed | BlocksStored | BlocksCleared], *, now: float) -> None:
        """Tells anew a part of what the engines that this gateway listens to hold."""
        for event in events:
            self._heard(event, now)

    def begin_blocks(self) -> None:
        """What was lost of block changes is about to be told anew, or is nobody's business any more."""
        self.has_lost_blocks = False

    # ---- what is told regularly, and on request ---------------------------------------------------------------------

    def renew(self, *, now: float) -> None:
        """Names everything this gateway holds: its leases run anew."""
        if self._renewed_at is not None and now - self._renewed_at > self._lease_s:
            self.lapsed_count += 1
            self._renewed_at = now
            self.begin_epoch(now=now)
            return
        self._renewed_at = now
        self._say(Held(steps(sorted(self._numbers.values()))), now)

    def ask(self, member: str, *, wants_blocks: bool, now: float) -> None:
        """Wants to hear again what that member (empty: everybody) holds."""
        self._say(Ask(member, wants_blocks), now)

    def restate(self, *, now: float) -> None:
        """Tells all reservations anew; who knows them already learns nothing."""
        for request_id, number in self._numbers.items():
            reservation = self._scheduler.cluster.reservations.get(request_id)
            if reservation is not None:
                self._restate(number, reservation, now)
        self.renew(now=now)

    def begin_epoch(self, *, now: float) -> None:
        """What was said may be lost, or its time be over: it is void, and what is true now is told anew."""
        self.epoch += 1
        self._ledger.clear()
        self._has_lost_ledger = False
        self.restate(now=now)

    def say_goodbye(self, *, now: float) -> None:
        """This gateway stops."""
        self._say(Gone(), now)

    def _restate(self, number: int, reservation: Reservation, now: float) -> None:
        age_s = now - reservation.sent_at
        self._say(self._sent(number, reservation.request, reservation.estimate, age_s=age_s), now)
        if reservation.output_tokens > 0:
            self._say(Producing(number, reservation.output_tokens), now)
        elif reservation.prefill_done_at is not None:
            self._say(Prefilled(number), now)

    # ---- what waits, and what is sent -------------------------------------------------------------------------------

    def lose(self) -> None:
        """The others cannot be told now: what waits is thrown away, and nothing is kept until `begin_epoch`."""
        self.dropped_count += len(self)
        self._ledger.clear()
        self._blocks.clear()
        self._has_lost_ledger = self.has_lost_blocks = True
        self._since, self._held_bytes = None, 0

    def take(self, *, now: float) -> list[Letter]:
        """The messages to send now; they are gone from here."""
        self._begin_again_if_lapsed(now)
        if self._has_lost_ledger and not self._ledger:
            self.begin_epoch(now=now)
        age_us = _us(0.0 if self._since is None else now - self._since)
        own_shard = shard_of(self.member, self._shard_count)
        letters = [self._letter(own_shard, part, age_us) for part in _parts(self._ledger)]
        by_shard: dict[int, list[WireEvent]] = {}
        for event in self._blocks:
            by_shard.setdefault(shard_of(event.engine, self._shard_count), []).append(event)
        letters += [self._letter(shard, part, age_us) for shard in sorted(by_shard) for part in _parts(by_shard[shard])]
        self._ledger.clear()
        self._blocks.clear()
        self._since, self._held_bytes = None, 0
        return letters

    def _begin_again_if_lapsed(self, now: float) -> None:
        """A gateway that was suspended must not go on as if its leases stood."""
        if self._renewed_at is not None and now - self._renewed_at > self._lease_s:
            self.renew(now=now)

    def _letter(self, shard: int, events: tuple[WireEvent, ...], age_us: int) -> Letter:
        sequence = self._sequences[shard] = self._sequences.get(shard, 0) + 1
        lease_ms = max(1, round(self._lease_s * 1e3))
        return Letter(shard, Message(self.member, self.epoch, sequence, lease_ms, age_us, events))

    def _say(self, event: LedgerEvent, now: float) -> None:
        if self._has_room(event, now) and not self._has_lost_ledger:
            self._ledger.append(event)
        else:
            self.dropped_count += 1
            self._has_lost_ledger = True

    def _say_blocks(self, event: BlocksEvent, now: float) -> None:
        if self._has_room(event, now) and not self.has_lost_blocks:
            self._blocks.append(event)
        else:
            self.dropped_count += 1
            self.has_lost_blocks = True

    def _has_room(self, event: WireEvent, now: float) -> bool:
        if self._since is None:
            self._since = now
        if isinstance(event, Sent | Stored | Removed):
            self._held_bytes += len(event.hashes)
        return len(self) < self._max_events and self._held_bytes <= MAX_HELD_BYTES


def _us(seconds: float) -> int:
    return max(0, round(seconds * MICROSECONDS))


def _parts(events: Iterable[WireEvent]) -> Iterable[tuple[WireEvent, ...]]:
    """The events in order, in pieces that a message takes."""
    part: list[WireEvent] = []
    part_bytes = 0
    for event in events:
        event_bytes = EVENT_BYTES
        if isinstance(event, Sent | Stored | Removed):
            event_bytes += len(event.hashes)
        elif isinstance(event, Held):
            event_bytes += 2 * len(event.steps)
        if part and part_bytes + event_bytes > FULL_MESSAGE_BYTES:
            yield tuple(part)
            part, part_bytes = [], 0
        part.append(event)
        part_bytes += event_bytes
    if part:
        yield tuple(part)
