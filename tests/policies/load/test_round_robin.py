"""Round robin: each stage's engines in turn."""

import random

from gateway.core.types import Role
from gateway.policies.load.round_robin import RoundRobin
from tests.builders import a_dispatch, a_load, a_pair_table, a_request, chosen


def test_prefill_and_decode_take_turns_independently() -> None:
    """Requests 0..5 over 2 prefill and 3 decode engines: N mod 2 and N mod 3."""
    prefills = [a_load(name, Role.PREFILL) for name in ("p0", "p1")]
    pairs = a_pair_table(prefills, [a_load(name, Role.DECODE) for name in ("d0", "d1", "d2")])
    chooser = RoundRobin().start(random.Random(0))
    turns = []
    for _ in range(6):
        turns.append(chosen(chooser, a_request(), pairs))
        chooser.dispatched(a_request(), a_dispatch(), now=0.0)
    expected = [("p0", "d0"), ("p1", "d1"), ("p0", "d2"), ("p1", "d0"), ("p0", "d1"), ("p1", "d2")]
    assert turns == expected


def test_a_decision_that_is_not_sent_takes_no_turn() -> None:
    pairs = a_pair_table([a_load("p0", Role.PREFILL), a_load("p1", Role.PREFILL)], [a_load("d0", Role.DECODE)])
    chooser = RoundRobin().start(random.Random(0))
    assert [chosen(chooser, a_request(), pairs) for _ in range(2)] == [("p0", "d0"), ("p0", "d0")]
