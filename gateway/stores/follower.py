"""What other gateways said, as events for the core. Pure: bytes in, events and wishes out.

happening                                        answer
bytes that are no message, an unknown version    counted, told once, skipped: the next message is read as ever
our own message come round                       skipped
a number already seen                            skipped: a store may deliver twice
a number ahead: messages were lost               taken in, and everything of that member is asked for again
block events under a lower fencing token         void: another gateway listens to that engine by now
reservations named that we do not know           asked for (by the owner of the ledger, see `missing`)
Ask                                              kept for the outbox to answer
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate

from gateway.core.events import (
    BlocksCleared,
    BlocksRemoved,
    BlocksStored,
    Event,
    KvFeed,
    PeerGone,
    PeerHolds,
    PeerMoved,
    PeerSent,
    PeerStage,
)
from gateway.core.types import Estimate, Request
from gateway.stores.codec import (
    Ask,
    BlocksEvent,
    Cleared,
    Ended,
    Feed,
    Gone,
    Held,
    LedgerEvent,
    MalformedMessage,
    Message,
    Prefilled,
    Producing,
    Removed,
    Sent,
    Stored,
    UnknownVersion,
    decode,
    unpacked,
)

MAX_MEMBERS = 1024
MAX_ENGINES = 100_000


@dataclass(slots=True)
class FollowCounts:
    """What was read, since the start."""

    messages: int = 0
    events: int = 0
    malformed: int = 0
    unknown_versions: int = 0
    gaps: int = 0
    fenced: int = 0
    """Block events of a gateway that listens no more."""


@dataclass(slots=True)
class Wishes:
    """What this gateway should say because of what it read."""

    ask: set[str] = field(default_factory=set)
    """Members whose reservations have to be heard again."""
    wants_blocks: bool = False
    """Whether block events were lost."""
    is_asked: bool = False
    """Whether somebody asked for our reservations."""
    is_asked_blocks: bool = False
    """Whether somebody asked for the blocks that we listen to."""


class Follower:
    """Follows all shards for one gateway."""

    def __init__(self, member: str, *, follows_blocks: Callable[[str], bool]) -> None:
        """`follows_blocks` says of an engine whether its blocks are to be taken from others."""
        self.member = member
        self.counts = FollowCounts()
        self.wishes = Wishes()
        self.last_fault = ""
        """What was wrong with the last message that was not sound."""
        self.feeds: dict[str, Feed] = {}
        """By engine: how its stream stands, and who (by fencing token) listens."""
        self._follows_blocks = follows_blocks
        self._sequences: dict[tuple[str, int], int] = {}
        self._tokens: dict[str, int] = {}

    def take(self, shard: int, data: bytes) -> list[Event]:
        """The events in one message, in order."""
        self.counts.messages += 1
        try:
            message = decode(data)
        except UnknownVersion as error:
            self.counts.unknown_versions += 1
            self.last_fault = error.message
            return []
        except MalformedMessage as error:
            self.counts.malformed += 1
            self.last_fault = error.message
            return []
        if message.member == self.member or not self._is_new(shard, message):
            return []
        self.counts.events += len(message.events)
        return [event for wire in message.events for event in self._translate(message, wire)]

    def forget_tokens(self) -> None:
        """The store began anew, and its fencing tokens with it."""
        self._tokens.clear()
        self.feeds.clear()

    def take_wishes(self) -> Wishes:
        """The wishes since the last call."""
        wishes, self.wishes = self.wishes, Wishes()
        return wishes

    def _is_new(self, shard: int, message: Message) -> bool:
        key = (message.member, shard)
        last = self._sequences.pop(key, None)
        self._sequences[key] = max(message.sequence, last or 0)
        while len(self._sequences) > MAX_MEMBERS:
            del self._sequences[next(iter(self._sequences))]
        if last is None or message.sequence == last + 1:
            return True
        if message.sequence <= last:
            return False
        self.counts.gaps += 1
        self.wishes.ask.add(message.member)
        self.wishes.wants_blocks = True
        return True

    def _translate(self, message: Message, wire: LedgerEvent | BlocksEvent) -> Iterator[Event]:
        owner, epoch = message.member, message.epoch
        match wire:
            case Sent():
                yield _peer_sent(message, wire)
            case Prefilled(number):
                yield PeerMoved(owner, epoch, number, PeerStage.PREFILLED)
            case Producing(number, output_tokens):
                yield PeerMoved(owner, epoch, number, PeerStage.PRODUCING, output_tokens)
            case Ended(number, is_finished):
                stage = PeerStage.FINISHED if is_finished else PeerStage.GIVEN_UP
                yield PeerMoved(owner, epoch, number, stage)
            case Held(steps):
                yield PeerHolds(owner, epoch, tuple(accumulate(steps)), message.lease_ms / 1e3)
            case Gone():
                yield PeerGone(owner, epoch)
            case Ask(member, wants_blocks):
                self.wishes.is_asked |= member in ("", self.member)
                self.wishes.is_asked_blocks |= wants_blocks
            case Stored() | Removed() | Cleared() | Feed():
                yield from self._blocks(wire)

    def _blocks(self, wire: BlocksEvent) -> Iterator[Event]:
        known = self._tokens.get(wire.engine, 0)
        if wire.token < known or (known == 0 and len(self._tokens) >= MAX_ENGINES):
            self.counts.fenced += 1
            return
        self._tokens[wire.engine] = wire.token
        if isinstance(wire, Feed):
            self.feeds[wire.engine] = wire
        if not self._follows_blocks(wire.engine):
            return
        match wire:
            case Stored(_, _, row, block_tokens, tier, hashes):
                yield BlocksStored(row, block_tokens, unpacked(hashes), tier)
            case Removed(_, _, row, block_tokens, tier, hashes):
                yield BlocksRemoved(row, block_tokens, unpacked(hashes), tier)
            case Cleared(_, _, row):
                yield BlocksCleared(row)
            case Feed(engine_id, _, state, rows):
                yield KvFeed(engine_id, state, rows)


def _peer_sent(message: Message, sent: Sent) -> PeerSent:
    size = sent.block_tokens
    request = Request(
        id="",
        model=sent.model,
        arrived_at=0.0,
        prompt_tokens=sent.prompt_tokens,
        max_output_tokens=sent.max_output_tokens,
        block_hashes={size: unpacked(sent.hashes)} if size and sent.hashes else {},
        priority=sent.priority,
        tenant=sent.tenant,
    )
    estimate = Estimate(
        prefill=sent.prefill,
        decode=sent.decode,
        wait_s=sent.wait_us / 1e6,
        fetch_s=sent.fetch_us / 1e6,
        prefill_s=sent.prefill_us / 1e6,
        hand_off_s=sent.hand_off_us / 1e6,
        join_s=sent.join_us / 1e6,
        tbt_s=sent.tbt_us / 1e6,
        cached_tokens=min(sent.cached_tokens, sent.prompt_tokens),
        fetch_from=sent.fetch_from,
        fetched_tokens=min(sent.fetched_tokens, sent.cached_tokens),
        stall_s=sent.stall_us / 1e6,
    )
    age_s = (sent.age_us + message.age_us) / 1e6
    return PeerSent(
        message.member, message.epoch, sent.number, request, estimate, sent.first_block, age_s, message.lease_ms / 1e3
    )
