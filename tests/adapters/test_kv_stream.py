import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.kv_stream import KvEventStream
from gateway.core.blocks import hash_prompt
from gateway.core.errors import MalformedEngineData
from gateway.core.events import BlocksCleared, Tier
from gateway.core.index import TIERS, PrefixIndex
from tests.adapters.kv_engine import KvEngine

PROMPT = [1, 2, 3, 4, 5, 6]


class Follower:
    """A stream, the index it feeds, and the engine it follows."""

    def __init__(self, can_replay=True):
        self.engine = KvEngine()
        self.stream = KvEventStream("e", max_blocks=1000, can_replay=can_replay)
        self.index = PrefixIndex(max_blocks=1000)
        self.index.add_engine("e")
        self.oldest = 0

    def take(self):
        events = self.stream.take()
        for event in events:
            self.index.apply(event)
        return events

    def hear(self, frames):
        """Gives the stream a live message and carries out the replays it asks for."""
        self.repair(self.stream.live(frames))

    def repair(self, replay_from):
        while replay_from is not None:
            for frames in self.engine.replay(replay_from, self.oldest):
                replay_from = self.stream.replayed(frames)

    def restart(self):
        self.engine = KvEngine()

    def say(self, prompt):
        """The engine caches a prompt; the message that says so."""
        self.engine.store(prompt)
        return self.engine.publish()

    def held(self, prompt=PROMPT):
        self.take()
        return int(self.index.match({2: hash_prompt(np.array(prompt), 2)}).cached_tokens[0])


def assert_index_is_right(follower):
    """Every block on every tier is in the index exactly when the engine holds it."""
    follower.take()
    for prefix in {prefix for prefix in follower.engine.held.values()} | {(1, 1), (2, 2), (1, 1, 2, 2)}:
        last_block = hash_prompt(np.array(prefix), 2)[-1:]
        tokens = follower.index.match({2: last_block}).tokens[0]
        media = {medium for (_, medium), held in follower.engine.held.items() if held == prefix}
        expected = [2 * bool(media & set(["GPU", "CPU"][: tier + 1])) for tier in range(len(TIERS))]
        assert tokens.tolist() == expected, prefix
    assert len(follower.index) == len(set(follower.engine.held.values()))


def test_messages_in_order_are_taken_in():
    follower = Follower()
    follower.hear(follower.say(PROMPT[:2]))
    follower.hear(follower.say(PROMPT))
    assert follower.held() == 6
    assert follower.stream.restart_count == follower.stream.lost_count == 0


def test_who_joins_late_asks_for_everything():
    follower = Follower()
    follower.say(PROMPT[:4])
    assert follower.stream.live(follower.say(PROMPT)) == 0
    follower.repair(0)
    assert follower.held() == 6


def test_a_connection_that_stands_asks_for_everything_before_any_message():
    follower = Follower()
    follower.say(PROMPT)
    follower.repair(follower.stream.connected())
    assert follower.held() == 6


def test_a_gap_is_replayed_from_the_last_message_seen():
    follower = Follower()
    follower.hear(follower.say(PROMPT[:2]))
    follower.say(PROMPT[:4])
    assert follower.stream.live(follower.say(PROMPT)) == 0
    follower.repair(0)
    assert follower.held() == 6
    assert follower.stream.lost_count == 0


def test_messages_known_from_a_replay_are_dropped_when_they_come_live():
    follower = Follower()
    late = [follower.say(PROMPT[:2]), follower.say(PROMPT[:4]), follower.say(PROMPT)]
    follower.repair(follower.stream.connected())
    for frames in late:
        assert follower.stream.live(frames) is None
    assert follower.held() == 6
    assert follower.stream.restart_count == 0


def test_duplicates_change_nothing():
    follower = Follower()
    first, second = follower.say(PROMPT[:2]), follower.say(PROMPT)
    for frames in (first, first, second, first, second):
        follower.hear(frames)
    assert follower.held() == 6
    assert follower.stream.restart_count == 0


def test_a_number_that_goes_back_means_a_restart_and_empties_the_index():
    follower = Follower()
    follower.hear(follower.say(PROMPT))
    follower.hear(follower.say([9, 9]))
    follower.take()
    follower.restart()
    follower.hear(follower.say([7, 7]))
    assert follower.take()[0] == BlocksCleared("e")
    assert (follower.held(), follower.held([7, 7]), follower.stream.restart_count) == (0, 2, 1)


def test_a_restart_is_noticed_though_the_new_engine_has_counted_past_the_old_one():
    follower = Follower()
    follower.hear(follower.say(PROMPT))
    follower.restart()
    for token in range(5):
        follower.say([token, token])
    follower.repair(follower.stream.connected())
    assert (follower.held(), follower.held([4, 4]), follower.stream.restart_count) == (0, 2, 1)


def test_a_restarted_engine_that_has_said_less_than_the_old_one_is_noticed_on_connecting():
    follower = Follower()
    follower.hear(follower.say(PROMPT))
    follower.hear(follower.say([9, 9]))
    follower.restart()
    follower.say([7, 7])
    follower.repair(follower.stream.connected())
    assert (follower.held(), follower.held([9, 9]), follower.held([7, 7])) == (0, 0, 2)


def test_the_same_engine_is_recognised_on_connecting_again():
    follower = Follower()
    follower.hear(follower.say(PROMPT))
    follower.repair(follower.stream.connected())
    assert (follower.held(), follower.stream.restart_count) == (6, 0)


def test_a_replay_that_does_not_reach_back_far_enough_empties_the_index():
    follower = Follower()
    follower.hear(follower.say(PROMPT))
    follower.say([7, 7])
    follower.oldest = 2
    follower.hear(follower.say([9, 9]))
    assert (follower.held(), follower.held([7, 7]), follower.held([9, 9])) == (0, 0, 2)
    assert follower.stream.lost_count == 1


def test_without_a_replay_a_gap_empties_the_index():
    follower = Follower(can_replay=False)
    follower.hear(follower.say(PROMPT))
    follower.say([7, 7])
    follower.hear(follower.say([9, 9]))
    assert (follower.held(), follower.held([9, 9]), follower.stream.lost_count) == (0, 2, 1)


def test_without_a_replay_a_new_connection_empties_the_index():
    follower = Follower(can_replay=False)
    assert follower.stream.connected() is None
    follower.hear(follower.say(PROMPT))
    assert follower.stream.connected() is None
    assert follower.held() == 0


def test_after_a_failed_replay_the_next_message_is_taken_as_it_comes():
    follower = Follower()
    follower.hear(follower.say(PROMPT))
    follower.say([7, 7])
    assert follower.stream.live(follower.say([8, 8])) == 0
    follower.stream.replay_failed()
    assert follower.stream.live(follower.say([9, 9])) is None
    assert (follower.held(), follower.held([9, 9])) == (0, 2)


def test_garbage_is_refused_and_repaired_like_a_missed_message():
    follower = Follower()
    follower.hear(follower.say(PROMPT[:2]))
    _, number, _ = follower.say(PROMPT[:4])
    with pytest.raises(MalformedEngineData):
        follower.stream.live([b"", number, b"\xc1garbage"])
    assert follower.held() == 2
    follower.hear(follower.say(PROMPT))
    assert follower.held() == 6


prompts = st.lists(st.sampled_from([1, 2]), min_size=2, max_size=8)
changes = st.lists(
    st.tuples(st.just("store"), prompts, st.sampled_from(["GPU", "CPU"]))
    | st.tuples(st.just("remove"), st.integers(0, 50))
    | st.tuples(st.just("clear")),
    min_size=1,
    max_size=3,
)
fates = st.sampled_from(["heard", "heard", "heard", "repeated", "lost", "garbled"])
accidents = st.sampled_from(["none", "none", "none", "reconnect", "restart", "take"])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(changes, fates, accidents), min_size=8, max_size=25))
def test_whatever_happens_to_the_messages_the_index_holds_what_the_engine_holds(steps):
    follower = Follower()
    for happenings, fate, accident in steps:
        for action, *details in happenings:
            getattr(follower.engine, action)(*details)
        frames = follower.engine.publish()
        if fate == "garbled":
            with pytest.raises(MalformedEngineData):
                follower.stream.live([*frames[:2], b"\xc1"])
        for _ in range({"heard": 1, "repeated": 2}.get(fate, 0)):
            follower.hear(frames)
        match accident:
            case "reconnect":
                follower.repair(follower.stream.connected())
            case "restart":
                follower.restart()
                follower.repair(follower.stream.connected())
            case "take":
                follower.take()
    follower.repair(follower.stream.connected())
    assert_index_is_right(follower)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(prompts, st.integers(0, 20)), min_size=5, max_size=20), st.sets(st.integers(0, 20)))
def test_with_messages_lost_for_good_the_index_holds_nothing_the_engine_does_not(steps, lost):
    follower = Follower(can_replay=False)
    for at, (prompt, removed) in enumerate(steps):
        follower.engine.store(prompt)
        follower.engine.remove(removed)
        frames = follower.engine.publish()
        if at not in lost:
            follower.hear(frames)
    follower.hear(follower.engine.publish())
    follower.take()
    engine_holds = {prefix for (_, medium), prefix in follower.engine.held.items() if medium == "GPU"}
    for length in (2, 4, 6, 8):
        for prefix in itertools.product([1, 2], repeat=length):
            last_block = hash_prompt(np.array(prefix), 2)[-1:]
            if follower.index.match({2: last_block}).device_tokens[0]:
                assert prefix in engine_holds


@settings(deadline=None)
@given(st.lists(st.tuples(prompts, st.integers(0, 50)), max_size=15), st.sets(st.integers(0, 15)))
def test_any_split_of_a_recorded_stream_gives_the_same_index(steps, cuts):
    whole, split = Follower(), Follower()
    for at, (prompt, removed) in enumerate(steps):
        whole.engine.store(prompt)
        whole.engine.remove(removed)
        frames = whole.engine.publish()
        whole.hear(frames)
        split.hear(frames)
        if at in cuts:
            split.take()
    split.engine = whole.engine
    assert_index_is_right(whole)
    assert_index_is_right(split)


def test_media_are_kept_apart():
    follower = Follower()
    follower.engine.store(PROMPT[:4])
    follower.engine.store(PROMPT, "CPU")
    follower.hear(follower.engine.publish())
    follower.take()
    match = follower.index.match({2: hash_prompt(np.array(PROMPT), 2)})
    assert match.tokens[0].tolist() == [4, 6, 6, 6]
    assert TIERS[1] is Tier.HOST
