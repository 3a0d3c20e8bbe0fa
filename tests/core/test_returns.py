"""Those who are refused come back one after the other, as many at one time as can be served."""

from hypothesis import given
from hypothesis import strategies as st

from gateway.core.interfaces import Patience, Refusal
from gateway.core.returns import (
    MAX_MODELS,
    MAX_PLACES,
    MAX_RETURN_S,
    MIN_SLOT_S,
    Returns,
    place_return_s,
    prefill_return_s,
)
from gateway.core.types import RejectReason, Slo, WaitReason
from tests.builders import a_request, an_estimate

TIMES = st.floats(0.0, 400.0)
PAUSE = Refusal(RejectReason.TTFT_SLO, "late")


def the_returns() -> Returns:
    return Returns()


def test_a_crowd_is_given_one_time_after_the_other() -> None:
    returns = the_returns()
    told = [returns.book(a_request(f"r{n}"), ready_s=4.0, slot_s=2.0, now=10.0) for n in range(50)]
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
        returns.book(a_request(f"r{number}"), ready_s=0.0, slot_s=1.0, now=0.0)
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
        told_s = returns.book(a_request(f"r{number}", model=f"m{number}"), ready_s=0.0, slot_s=1.0, now=0.0)
    assert told_s >= 9.0


def test_no_more_places_are_kept_than_stated_and_the_rest_is_spread() -> None:
    returns = the_returns()
    told = [returns.book(a_request(f"r{n}"), ready_s=0.0, slot_s=0.0, now=0.0) for n in range(MAX_PLACES + 100)]
    assert len(returns) == MAX_PLACES
    assert all(MAX_RETURN_S / 2 <= at_s <= MAX_RETURN_S for at_s in told[MAX_PLACES:])
    assert len(set(told[MAX_PLACES:])) == 100


@given(st.lists(st.tuples(TIMES, TIMES), max_size=40))
def test_nobody_is_told_to_come_before_it_is_ready_or_later_than_the_latest(asked: list[tuple[float, float]]) -> None:
    returns = the_returns()
    for number, (ready_s, slot_s) in enumerate(asked):
        told_s = returns.book(a_request(f"r{number}"), ready_s=ready_s, slot_s=slot_s, now=5.0)
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
