"""What one gateway's outbox says and another's follower makes of it, with nothing but bytes between them."""

from __future__ import annotations

import struct

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.events import (
    BlocksStored,
    Event,
    FeedState,
    Finished,
    FirstToken,
    KvFeed,
    Left,
    PeerHolds,
    PeerSent,
    PrefillDone,
    Progress,
)
from gateway.core.scheduler import Scheduler
from gateway.core.types import Dispatch, Role
from gateway.stores.codec import MalformedMessage, UnknownVersion, decode, encode
from gateway.stores.follower import Follower
from gateway.stores.outbox import Letter, Outbox
from tests.builders import a_mesh, a_request, a_scheduler, an_engine, an_estimate, hashes

LEASE_S = 5.0


class Speaker:
    """A gateway that decides, and tells."""

    def __init__(self, name: str = "a", *, max_events: int = 1000, shard_count: int = 1) -> None:
        self.scheduler = a_scheduler(*a_mesh())
        self.outbox = Outbox(name, self.scheduler, shard_count=shard_count, lease_s=LEASE_S, max_events=max_events)

    def dispatch(self, name: str, *, now: float = 0.0) -> None:
        decision = self.scheduler.decide(a_request(name), now=now)
        assert isinstance(decision, Dispatch)
        self.outbox.sent(a_request(name), decision.estimate, now=now)

    def happen(self, event: Event, *, now: float = 0.0) -> None:
        self.scheduler.apply(event, now=now)
        self.outbox.told(event, now=now)

    def letters(self, now: float = 0.0) -> list[Letter]:
        return self.outbox.take(now=now)


class Hearer:
    """A gateway that follows."""

    def __init__(self, name: str = "b") -> None:
        self.scheduler = a_scheduler(*a_mesh())
        self.follower = Follower(name, follows_blocks=lambda engine_id: True)

    def hear(self, letters: list[Letter], *, now: float = 0.0) -> list[Event]:
        events = [e for letter in letters for e in self.follower.take(letter.shard, encode(letter.message))]
        for event in events:
            self.scheduler.apply(event, now=now)
        return events


def load(scheduler: Scheduler) -> dict[str, tuple[int, int, int, int, int]]:
    scheduler.cluster.check()
    return {
        name: (state.own_count, state.prefill_us, state.queued_tokens, state.kv_tokens, state.producing_count)
        for name, state in scheduler.cluster.engines.items()
    }


def test_the_ledgers_are_the_same_at_every_stage_of_a_life():
    speaker, hearer = Speaker(), Hearer()
    speaker.dispatch("r1")
    speaker.dispatch("r2")
    lives = [PrefillDone("r1"), FirstToken("r1"), Progress("r1", 32), FirstToken("r2"), Finished("r1"), Left("r2")]
    for event in (None, *lives):
        if event is not None:
            speaker.happen(event)
        hearer.hear(speaker.letters())
        assert load(hearer.scheduler) == load(speaker.scheduler)
    assert not any(map(any, load(hearer.scheduler).values()))


def test_events_of_requests_that_hold_nothing_are_not_told():
    speaker = Speaker()
    for event in (PrefillDone("r9"), FirstToken("r9"), Progress("r9", 1), Finished("r9"), Left("r9")):
        speaker.happen(event)
    assert speaker.letters() == []


def test_what_is_told_again_after_asking_gives_the_whole_picture_to_one_that_knew_nothing():
    speaker, late = Speaker(), Hearer()
    for number in range(5):
        speaker.dispatch(f"r{number}")
    speaker.happen(PrefillDone("r1"))
    speaker.happen(FirstToken("r2"))
    speaker.happen(Progress("r2", 64))
    speaker.letters()
    speaker.outbox.restate(now=1.0)
    late.hear(speaker.letters(1.0), now=1.0)
    assert load(late.scheduler) == load(speaker.scheduler)


def test_a_message_that_was_lost_is_noticed_and_asked_for():
    speaker, hearer = Speaker(), Hearer()
    speaker.dispatch("r1")
    hearer.hear(speaker.letters())
    speaker.dispatch("r2")
    speaker.letters()  # lost
    speaker.dispatch("r3")
    hearer.hear(speaker.letters())
    wishes = hearer.follower.take_wishes()
    assert (wishes.ask, wishes.wants_blocks, hearer.follower.counts.gaps) == ({"a"}, True, 1)


def test_a_message_that_comes_twice_counts_once():
    speaker, hearer = Speaker(), Hearer()
    speaker.dispatch("r1")
    first = speaker.letters()
    speaker.happen(Finished("r1"))
    last = speaker.letters()
    for letters in (first, last, first, last):
        hearer.hear(letters)
    assert not any(map(any, load(hearer.scheduler).values()))


def test_our_own_messages_are_skipped():
    speaker = Speaker("b")
    speaker.dispatch("r1")
    assert Hearer("b").hear(speaker.letters()) == []


def test_an_outbox_that_nobody_empties_stays_in_its_bound_and_tells_the_truth_afterwards():
    speaker, hearer = Speaker(max_events=10), Hearer()
    for number in range(50):
        speaker.dispatch(f"r{number}")
    assert len(speaker.outbox) <= 10
    assert speaker.outbox.dropped_count >= 40
    for number in range(0, 50, 2):
        speaker.happen(Finished(f"r{number}"))
    speaker.outbox.lose()
    speaker.outbox._max_events = 1000
    hearer.hear(speaker.letters())
    assert load(hearer.scheduler) == load(speaker.scheduler)


def test_a_gateway_that_was_silent_for_longer_than_its_leases_begins_a_new_epoch():
    speaker, hearer = Speaker(), Hearer()
    speaker.outbox.renew(now=0.0)
    speaker.dispatch("r1")
    hearer.hear(speaker.letters())
    hearer.scheduler.wake(now=LEASE_S)
    speaker.happen(Finished("r1"), now=60.0)  # what it did just before it was suspended, told late
    speaker.dispatch("r2", now=60.0)
    letters = speaker.letters(60.0)
    assert {letter.message.epoch for letter in letters} == {2}
    hearer.hear(letters, now=60.0)
    assert load(hearer.scheduler) == load(speaker.scheduler)
    assert speaker.outbox.lapsed_count == 1


def test_a_clock_that_jumps_back_changes_nothing_for_others():
    speaker, hearer = Speaker(), Hearer()
    speaker.outbox.renew(now=1000.0)
    speaker.dispatch("r1", now=1000.0)
    hearer.hear(speaker.letters(1000.0), now=5.0)
    speaker.happen(FirstToken("r1"), now=1.0)
    speaker.outbox.renew(now=1.0)
    hearer.hear(speaker.letters(1.0), now=6.0)
    hearer.scheduler.wake(now=10.9)
    assert load(hearer.scheduler) == load(speaker.scheduler)


def test_a_message_carries_all_that_the_estimate_of_its_wait_needs():
    speaker = Speaker()
    estimate = an_estimate(wait_s=0.25, prefill_s=1.5, hand_off_s=0.125, tbt_s=0.0625, cached_tokens=64)
    speaker.outbox.sent(a_request("r1", max_output_tokens=77, tenant="t", priority=-3), estimate, now=0.0)
    (sent,) = Hearer().hear(speaker.letters(0.5))
    assert isinstance(sent, PeerSent)
    assert sent.estimate == estimate
    assert (sent.request.max_output_tokens, sent.request.tenant, sent.request.priority) == (77, "t", -3)
    assert sent.age_s == 0.5


# ---- blocks ----------------------------------------------------------------------------------------------------------


def listening(token: int = 1, name: str = "a") -> Speaker:
    speaker = Speaker(name)
    speaker.outbox.listens("p1", token)
    speaker.happen(KvFeed("p1", FeedState.LIVE, ("p1",)))
    return speaker


def block_count(hearer: Hearer) -> int:
    return hearer.scheduler.prefixes.index.engine_block_count("p1")


def test_blocks_that_one_gateway_hears_are_known_to_the_others():
    speaker, hearer = listening(), Hearer()
    speaker.happen(BlocksStored("p1", 16, hashes(*range(1, 10_001))))
    hearer.hear(speaker.letters())
    assert block_count(hearer) == 4096  # the builders' bound on the index
    assert hearer.follower.feeds["p1"].state is FeedState.LIVE


def test_blocks_heard_without_the_lease_are_told_to_nobody():
    speaker = Speaker()
    speaker.happen(KvFeed("p1", FeedState.LIVE, ("p1",)))
    speaker.happen(BlocksStored("p1", 16, hashes(1, 2)))
    assert speaker.letters() == []


def test_one_that_listens_no_more_is_not_believed():
    before, after, hearer = listening(1, "a"), listening(2, "c"), Hearer()
    before.happen(BlocksStored("p1", 16, hashes(1, 2)))
    old = before.letters()
    after.happen(BlocksStored("p1", 16, hashes(3)))
    hearer.hear(after.letters())
    hearer.hear(old)
    assert block_count(hearer) == 1
    assert hearer.follower.counts.fenced == 2
    hearer.follower.forget_tokens()  # the store began anew, and its tokens with it
    hearer.hear(listening(1, "d").letters())
    assert hearer.follower.feeds["p1"].token == 1


def test_a_dispatch_to_an_engine_that_announces_tells_its_new_blocks_only():
    engines = an_engine("p1", Role.PREFILL, block_tokens=16), an_engine("d1", Role.DECODE)
    scheduler = a_scheduler(*engines)
    scheduler.apply(KvFeed("p1", FeedState.LIVE, ("p1",)), now=0.0)
    outbox = Outbox("a", scheduler, shard_count=1, lease_s=LEASE_S, max_events=10)
    request = a_request(block_hashes={16: hashes(*range(1, 7))})
    outbox.sent(request, an_estimate(cached_tokens=64), now=0.0)
    (sent,) = Hearer().hear(outbox.take(now=0.0))
    assert isinstance(sent, PeerSent)
    assert (sent.first_block, sent.request.block_hashes[16].tolist()) == (4, [5, 6])


def test_messages_go_to_the_shard_of_their_name_and_are_numbered_there():
    speaker = Speaker(shard_count=8)
    for number in range(3):
        speaker.outbox.listens(f"p{number}", 1)
        speaker.happen(KvFeed(f"p{number}", FeedState.LIVE, (f"p{number}",)))
    speaker.dispatch("r1")
    first, second = speaker.letters(), []
    speaker.happen(Finished("r1"))
    second = speaker.letters()
    assert len({letter.shard for letter in first}) > 1
    ledger = first[0].shard
    assert [letter.shard for letter in second] == [ledger]
    assert second[0].message.sequence == sum(letter.shard == ledger for letter in first) + 1


# ---- bytes -----------------------------------------------------------------------------------------------------------


def a_message() -> bytes:
    speaker = Speaker()
    speaker.dispatch("r1")
    speaker.outbox.renew(now=0.0)
    return encode(speaker.letters()[0].message)


def test_a_dispatch_without_blocks_takes_about_a_hundred_bytes_and_what_follows_it_a_few():
    speaker = Speaker()
    speaker.dispatch("r1")
    dispatch = len(encode(speaker.letters()[0].message))
    for event in (PrefillDone("r1"), FirstToken("r1"), Progress("r1", 32), Finished("r1")):
        speaker.happen(event)
    rest = len(encode(speaker.letters()[0].message))
    assert dispatch < 120
    assert rest < 60


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01",
        b"\x01garbage",
        b"\x01" + msgspec.msgpack.encode(["a", 1, 1, 5000, 0, [[99, 1]]]),
        b"\x01" + msgspec.msgpack.encode(["a", -1, 1, 5000, 0, []]),
        b"\x01" + msgspec.msgpack.encode(["a", 1, 1, 0, 0, []]),
        b"\x01" + msgspec.msgpack.encode(["a", 1, 1, 5000, 0, [[8, "p1", 1, "p1", 16, "device", b"half"]]]),
        b"\x01" + msgspec.msgpack.encode(["a", 1, 1, 5000, 0, [[3, 1, 2**40]]]),
        bytes(2**20 + 1),
    ],
)
def test_bytes_that_are_no_message_are_counted_and_skipped(data):
    hearer = Hearer()
    with pytest.raises(MalformedMessage):
        decode(data)
    assert hearer.follower.take(0, data) == []
    assert hearer.follower.counts.malformed + hearer.follower.counts.unknown_versions == 1
    assert len(hearer.follower.take(0, a_message())) == 2


def test_a_version_that_is_not_ours_is_skipped_and_the_next_message_read():
    hearer = Hearer()
    with pytest.raises(UnknownVersion):
        decode(b"\x02" + a_message()[1:])
    hearer.follower.take(0, b"\x02" + a_message()[1:])
    assert hearer.follower.counts.unknown_versions == 1
    assert "version 2" in hearer.follower.last_fault
    assert len(hearer.follower.take(0, a_message())) == 2


@given(st.binary(max_size=300), st.integers(0, 200), st.binary(min_size=1, max_size=4))
def test_no_bytes_whatever_break_the_follower(junk, at, patch):
    hearer = Hearer()
    whole = a_message()
    for data in (junk, b"\x01" + junk, whole[:at], whole[:at] + patch + whole[at + len(patch) :]):
        for event in hearer.follower.take(0, data):
            hearer.scheduler.apply(event, now=0.0)
    hearer.scheduler.cluster.check()


def test_items_that_a_later_release_adds_to_an_event_are_ignored():
    later = b"\x01" + msgspec.msgpack.encode(["a", 1, 1, 5000, 0, [[5, [1, 2], "new"], [2, 1, {"also": "new"}]]])
    events = Hearer().follower.take(0, later)
    assert isinstance(events[0], PeerHolds)
    assert events[0].numbers == (1, 3)


def test_hashes_are_little_endian_whatever_the_machine():
    speaker = listening()
    speaker.happen(BlocksStored("p1", 16, np.array([1, 2**63], np.uint64)))
    assert struct.pack("<2Q", 1, 2**63) in encode(speaker.letters()[0].message)
