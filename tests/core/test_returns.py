"""Those who are refused come back one after the other, as many at one time as can be served."""

from collections import Counter
from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.interfaces import Patience, Refusal
from gateway.core.returns import (
    LATE_S,
    MAX_ALIKE,
    MAX_MODELS,
    MAX_PLACES,
    MAX_RETURN_S,
    MIN_SLOT_S,
    Returns,
    place_return_s,
    prefill_return_s,
)
from gateway.core.types import RejectReason, Request, Slo, WaitReason
from tests.builders import a_request, an_estimate

TIMES = st.floats(0.0, 400.0)
PAUSE = Refusal(RejectReason.TTFT_SLO, "late")


def the_returns() -> Returns:
    return Returns()


def one_of_many(number: int, *, model: str = "m") -> Request:
    """A request that is like no other."""
    return a_request(f"r{number}", prompt_tokens=100 + number, model=model)


def test_a_crowd_is_given_one_time_after_the_other() -> None:
    returns = the_returns()
    told = [returns.book(one_of_many(n), ready_s=4.0, slot_s=2.0, now=10.0) for n in range(50)]
    assert all(4.0 + 2.0 * n <= at_s <= 6.0 + 2.0 * n for n, at_s in enumerate(told))


def test_the_instant_is_drawn_by_the_id_alone() -> None:
    told = [
        the_returns().book(a_request(name), ready_s=1.0, slot_s=5.0, now=now) for now in (0.0, 7.0) for name in "abcd"
    ]
    assert told[:4] == told[4:]
    assert len(set(told)) == 4


def test_a_short_one_takes_a_gap_that_the_others_leave() -> None:
    returns = the_returns()
    returns.book(a_request("far"), ready_s=10.0, slot_s=5.0, now=0.0)
    assert returns.book(a_request("near"), ready_s=0.0, slot_s=10.0, now=0.0) <= 10.0
    assert returns.book(a_request("last"), ready_s=0.0, slot_s=1.0, now=0.0) >= 15.0


def test_what_is_over_is_forgotten() -> None:
    returns = the_returns()
    for number in range(20):
        returns.book(one_of_many(number), ready_s=0.0, slot_s=1.0, now=0.0)
    assert len(returns) == 20
    assert returns.book(a_request("later"), ready_s=0.0, slot_s=1.0, now=100.0) <= 1.0
    assert len(returns) == 1


def test_models_do_not_wait_for_one_another() -> None:
    returns = the_returns()
    returns.book(a_request("r1", model="a"), ready_s=0.0, slot_s=50.0, now=0.0)
    assert returns.book(a_request("r2", model="b"), ready_s=0.0, slot_s=1.0, now=0.0) <= 1.0


def test_names_that_clients_make_up_have_one_line_in_the_end() -> None:
    returns = the_returns()
    for number in range(MAX_MODELS + 10):
        told_s = returns.book(one_of_many(number, model=f"m{number}"), ready_s=0.0, slot_s=1.0, now=0.0)
    assert told_s >= 9.0


def test_no_more_places_are_kept_than_stated_and_the_rest_is_spread() -> None:
    returns = the_returns()
    told = [returns.book(one_of_many(n), ready_s=0.0, slot_s=0.0, now=0.0) for n in range(MAX_PLACES + 100)]
    assert len(returns) == MAX_PLACES
    assert all(MAX_RETURN_S / 2 <= at_s <= MAX_RETURN_S for at_s in told[MAX_PLACES:])
    assert len(set(told[MAX_PLACES:])) == 100


@given(st.lists(st.tuples(TIMES, TIMES), max_size=40))
def test_nobody_is_told_to_come_before_it_is_ready_or_later_than_the_latest(asked: list[tuple[float, float]]) -> None:
    returns = the_returns()
    for number, (ready_s, slot_s) in enumerate(asked):
        told_s = returns.book(one_of_many(number), ready_s=ready_s, slot_s=slot_s, now=5.0)
        assert min(ready_s, 0.9 * MAX_RETURN_S) - MIN_SLOT_S <= told_s <= MAX_RETURN_S


def test_who_waits_for_a_prefill_engine_goes_first() -> None:
    best = an_estimate(wait_s=3.0, prefill_s=2.0, hand_off_s=0.0, join_s=0.0)
    waiting = [Patience(WaitReason.PREFILL_BUSY, 9.0, PAUSE, best)] * 4 + [Patience(WaitReason.DECODE_FULL, 9.0, PAUSE)]
    bound = a_request(slo=Slo(ttft_s=5.0))
    assert prefill_return_s(bound, best, [], waiting, now=0.0) == (5.0, 2.0)  # 8 s ahead, and it can wait for 3
    assert prefill_return_s(a_request(), best, [], waiting, now=0.0) == (8.0, 2.0)
    assert prefill_return_s(bound, best, [], [], now=0.0) == (0.0, 2.0)


def test_who_waits_for_a_place_has_the_first_one() -> None:
    waiting = [Patience(WaitReason.DECODE_FULL, 9.0, PAUSE)] * 3 + [Patience(WaitReason.PREFILL_BUSY, 9.0, PAUSE)]
    assert place_return_s(0.5, waiting) == (2.0, 0.5)


def test_one_who_asks_all_the_time_does_not_fill_the_line() -> None:
    returns = the_returns()
    for number in range(1000):
        told_s = returns.book(a_request(f"h{number}", client=7), ready_s=0.0, slot_s=1.0, now=0.1 * number)
        assert told_s <= MAX_ALIKE
    assert returns.book(a_request("other", client=8), ready_s=0.0, slot_s=1.0, now=100.0) <= MAX_ALIKE + 1.0


def test_those_who_ask_the_same_are_spread_over_some_places() -> None:
    returns = the_returns()
    told = [returns.book(a_request(f"r{n}", client=7), ready_s=4.0, slot_s=2.0, now=10.0) for n in range(400)]
    assert all(4.0 <= at_s <= 4.0 + 2.0 * MAX_ALIKE for at_s in told)
    per_place = Counter(int((at_s - 4.0) // 2.0) for at_s in told)
    assert len(per_place) == MAX_ALIKE
    assert max(per_place.values()) <= 2 * 400 / MAX_ALIKE


def test_tenants_and_prompts_have_places_of_their_own() -> None:
    returns = the_returns()
    block = {16: np.array([1, 2], dtype=np.uint64)}
    for number in range(MAX_ALIKE):
        returns.book(a_request(f"h{number}", client=7, block_hashes=block), ready_s=0.0, slot_s=1.0, now=0.0)
    alike = a_request("h", client=7, block_hashes=block)
    for other in (
        replace(alike, tenant="t"),
        replace(alike, client=8),
        replace(alike, client=None),
        replace(alike, prompt_tokens=1),
        replace(alike, block_hashes={16: np.array([1, 3], dtype=np.uint64)}),
    ):
        assert returns.book(other, ready_s=0.0, slot_s=1.0, now=0.0) >= MAX_ALIKE
    assert returns.book(alike, ready_s=0.0, slot_s=1.0, now=0.0) <= MAX_ALIKE


def test_whoever_comes_late_gets_a_new_time() -> None:
    returns = the_returns()
    for number in range(MAX_ALIKE):
        returns.book(a_request(f"h{number}", client=7), ready_s=0.0, slot_s=1.0, now=0.0)
    late_at = MAX_ALIKE + LATE_S + 0.1
    assert returns.book(a_request("late", client=7), ready_s=3.0, slot_s=1.0, now=late_at) >= 3.0
    assert len(returns) == 1


def test_who_comes_when_it_was_told_is_expected_once() -> None:
    returns = the_returns()
    told_s = returns.book(a_request("r1", client=7), ready_s=2.0, slot_s=1.0, now=0.0)
    assert not returns.take(a_request("r2", client=7), now=1.9)
    assert not returns.take(a_request("r3", client=8), now=told_s)
    assert returns.take(a_request("r4", client=7), now=told_s)
    assert not returns.take(a_request("r5", client=7), now=told_s)
    assert not len(returns)


def test_whoever_is_a_little_late_is_expected_still() -> None:
    for late_s, is_expected in ((0.9 * LATE_S, True), (1.1 * LATE_S, False)):
        returns = the_returns()
        returns.book(a_request("r1", client=7), ready_s=2.0, slot_s=1.0, now=0.0)
        assert returns.take(a_request("r2", client=7), now=3.0 + late_s) is is_expected


def test_a_client_that_nobody_knows_is_never_expected() -> None:
    returns = the_returns()
    told_s = returns.book(a_request("r1"), ready_s=2.0, slot_s=1.0, now=0.0)
    assert not returns.take(a_request("r2"), now=told_s)
