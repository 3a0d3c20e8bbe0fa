"""Vacancies are offered to one gateway after the other, and all of them know whose turn it is without asking."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.admissions.sluice import Sluice
from gateway.core.events import Joined, PeerGone, PeerHolds
from gateway.core.turns import IDLE_S, Turns
from gateway.core.types import Dispatch, Slo, Wait
from tests.builders import a_pair, a_request, a_scheduler

TURN_S = 0.02
NAMES = ("a", "b", "c", "d")


def members(names: Sequence[str] = NAMES) -> list[Turns]:
    """The turns of gateways that know one another."""
    turns = []
    for name in names:
        own = Turns()
        own.join(name, TURN_S)
        own.found(other for other in names if other != name)
        turns.append(own)
    return turns


def test_a_gateway_that_is_alone_always_has_its_turn():
    turns = Turns()
    turns.join("a", TURN_S)
    turns.arrived(0.0)
    for opens_s, expected_s in ((-inf, 0.0), (-0.6, 0.0), (-0.001, 0.0), (0.0, 0.0), (0.3, 0.3)):
        assert turns.in_s(turns.delay_s("p1", 7), opens_s, is_idle=opens_s < -0.5, now=1.0) == expected_s


def test_turns_of_no_length_hold_nobody_up():
    first, second = Turns(), Turns()
    for turns, own, other in ((first, "a", "b"), (second, "b", "a")):
        turns.join(own, 0.0)
        turns.found([other])
        assert turns.in_s(turns.delay_s("p1", 7), 0.0, is_idle=False, now=1.0) == 0.0


def test_each_has_another_place_in_the_line_and_who_is_first_changes():
    firsts = set()
    for marks in range(40):
        delays = [turns.delay_s("p1", marks) for turns in members()]
        assert sorted(delays) == pytest.approx([0.0, TURN_S, 2 * TURN_S, 3 * TURN_S])
        firsts.add(delays.index(0.0))
    assert firsts == {0, 1, 2, 3}


def test_all_agree_whatever_the_order_in_which_they_heard():
    sent = [("a", 100), ("b", 100), ("c", 900)]
    lots = set()
    for turns in members():
        for order in permutations(sent):
            marks = sum(turns.mark("" if owner == turns.own else owner, tokens) for owner, tokens in order)
            lots.add(marks)
    assert len(lots) == 1


@given(
    st.integers(0, 2**40),
    st.floats(-0.5, 10, allow_nan=False),
    st.integers(2, 9),
)
def test_of_those_who_wait_at_most_one_may_send_at_a_time_and_each_may_within_a_round(marks, open_for_s, count):
    everybody = members([f"g{number}" for number in range(count)])
    waits = [turns.in_s(turns.delay_s("p1", marks), -open_for_s, is_idle=False, now=9.0) for turns in everybody]
    assert sum(wait == 0.0 for wait in waits) <= 1
    assert all(0.0 <= wait <= max(0.0, -open_for_s) + count * TURN_S + 1e-9 for wait in waits)
    for turns, wait in zip(everybody, waits, strict=True):
        at = open_for_s + wait + 1e-6 * (wait > 0.0)
        delay_s = turns.delay_s("p1", marks)
        assert turns.in_s(delay_s, -at, is_idle=False, now=9.0) == 0.0, "its turn comes when it was said to"


def test_of_an_idle_engine_the_first_is_free_to_send_and_a_burst_goes_to_different_ones():
    takers = {}
    for turns in members():
        turns.arrived(100.0)
        for engine in range(32):
            if turns.in_s(turns.delay_s(f"p{engine}", 0), -2 * IDLE_S, is_idle=True, now=100.0) == 0.0:
                assert engine not in takers, "only one gateway may take it at once"
                takers[engine] = turns.own
    assert len(takers) == 32


def test_an_arrival_that_follows_at_once_does_not_begin_the_offer_anew():
    turns = next(each for each in members() if each.delay_s("p1", 0) > 0.0)
    delay_s = turns.delay_s("p1", 0)
    turns.arrived(100.0)
    turns.arrived(100.0 + delay_s)
    assert turns.in_s(delay_s, -100.0, is_idle=True, now=100.0 + delay_s) == 0.0


def test_members_are_those_who_live():
    scheduler = a_scheduler(*a_pair())
    scheduler.apply(Joined("g1", TURN_S), now=0.0)
    scheduler.apply(PeerHolds("g2", 1, (), 5.0), now=0.0)
    scheduler.apply(PeerHolds("g3", 1, (), 9.0), now=0.0)
    assert scheduler.cluster.turns.member_count == 3
    scheduler.wake(now=6.0)
    assert scheduler.cluster.turns.member_count == 2, "one gave no sign for too long"
    scheduler.apply(PeerGone("g3", 1), now=6.0)
    assert scheduler.cluster.turns.member_count == 1
    assert scheduler.cluster.engines["p1"].turn_s == 0.0


def test_a_gateway_that_leaves_and_comes_back_has_its_turns_again():
    scheduler = a_scheduler(*a_pair())
    scheduler.apply(Joined("g1", TURN_S), now=0.0)
    scheduler.apply(PeerGone("g2", 1), now=0.0)
    assert scheduler.cluster.turns.member_count == 1
    scheduler.apply(PeerHolds("g2", 2, (), 5.0), now=1.0)
    assert scheduler.cluster.turns.member_count == 2


def test_a_request_that_comes_out_of_turn_is_sent_when_its_turn_comes():
    """Under the default rule it waits in the gateway for just so long; whoever is first sends at once."""
    waits = []
    for own, other in (("g1", "g2"), ("g2", "g1")):
        scheduler = a_scheduler(*a_pair(), admission=Sluice())
        scheduler.apply(Joined(own, TURN_S), now=0.0)
        scheduler.apply(PeerHolds(other, 1, (), 5.0), now=0.0)
        decision = scheduler.decide(a_request("r1", slo=Slo(ttft_s=10.0), arrived_at=1.0), now=1.0)
        at = 1.0
        if isinstance(decision, Wait):
            at = scheduler.next_wakeup() or 0.0
            (decision,) = scheduler.wake(now=at)
        assert isinstance(decision, Dispatch)
        waits.append(at - 1.0)
    assert sorted(waits) == pytest.approx([0.0, TURN_S])
