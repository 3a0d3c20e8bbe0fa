"""The waiting queue: bounded, in the order of class, tenant and slack, each wait with an end."""

from __future__ import annotations

from math import inf
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.fairness import Fairness
from gateway.core.types import Request, Slo
from gateway.core.waiting import WaitingQueue, latest_start_at
from tests.builders import a_request

BOUND = Slo(ttft_s=10.0)


def a_bound_request(name: str, **fields: Any) -> Request:
    return a_request(name, **{"slo": BOUND, **fields})


def a_queue(*requests: Request, **settings: Any) -> WaitingQueue:
    queue = WaitingQueue(len(requests) + 10, **settings)
    for request in requests:
        queue.add(request, inf, latest_start_at(request))
    return queue


def order(queue: WaitingQueue, now: float = 0.0) -> list[str]:
    return [request.id for request in queue.in_order(now=now)]


def send(queue: WaitingQueue, count: int, *, now: float = 0.0, service_s: float = 1.0) -> list[str]:
    """Sends the next so many requests one by one, each at its own wake-up."""
    sent = []
    for _ in range(count):
        request = next(queue.in_order(now=now))
        queue.remove(request.id)
        queue.dispatched(request, service_s, now=now)
        sent.append(request.id)
    return sent


# ---- the order -------------------------------------------------------------------------------------------------------


def test_of_one_tenant_the_request_with_the_least_slack_comes_first() -> None:
    queue = a_queue(
        a_bound_request("loose", slo=Slo(ttft_s=9.0)),
        a_bound_request("tight", slo=Slo(ttft_s=2.0)),
        a_bound_request("late", slo=Slo(ttft_s=2.0), arrived_at=1.0),
    )
    assert order(queue) == ["tight", "late", "loose"]


def test_requests_without_bounds_are_given_in_the_order_they_arrived_whenever_they_were_added() -> None:
    queue = a_queue(*(a_request(name, arrived_at=at) for name, at in (("b", 2.0), ("a", 1.0), ("c", 1.0))))
    assert order(queue) == ["a", "c", "b"]


def test_best_effort_goes_behind_every_request_that_has_a_bound() -> None:
    queue = a_queue(a_request("any time", priority=2), a_bound_request("soon", priority=0, arrived_at=5.0))
    assert order(queue) == ["soon", "any time"]


@pytest.mark.parametrize("slo", [Slo(ttft_s=1), Slo(tbt_s=1), Slo(tpot_s=1), Slo(deadline_s=1)], ids=repr)
def test_any_bound_is_one(slo: Slo) -> None:
    assert order(a_queue(a_request("none"), a_request("some", slo=slo))) == ["some", "none"]


def test_a_higher_priority_goes_first_whatever_the_slack() -> None:
    queue = a_queue(a_bound_request("low", slo=Slo(ttft_s=0.1)), a_bound_request("high", priority=1))
    assert order(queue) == ["high", "low"]


def test_tenants_take_turns_by_weight() -> None:
    requests = [a_bound_request(f"{tenant}{n}", tenant=tenant) for tenant in ("big", "small") for n in range(9)]
    queue = a_queue(*requests, fairness=Fairness({"big": 2.0}))
    sent = send(queue, 9)
    assert sum(name.startswith("big") for name in sent) == 6


def test_one_that_sends_ten_times_as_much_gets_no_more() -> None:
    flood = [a_bound_request(f"flood{n}", tenant="flood") for n in range(100)]
    modest = [a_bound_request(f"modest{n}", tenant="modest", arrived_at=1.0) for n in range(10)]
    sent = send(a_queue(*flood, *modest), 20)
    assert sum(name.startswith("modest") for name in sent) == 10


def test_the_order_follows_what_was_sent_on_the_way() -> None:
    queue = a_queue(*(a_bound_request(f"{tenant}{n}", tenant=tenant) for tenant in "ab" for n in range(2)))
    sent = []
    for request in queue.in_order(now=0.0):
        queue.remove(request.id)
        queue.dispatched(request, 1.0, now=0.0)
        sent.append(request.id)
    assert sent == ["a0", "b0", "a1", "b1"]


def test_of_tenants_served_alike_the_one_that_began_to_wait_first_goes_first() -> None:
    queue = a_queue(a_bound_request("1", tenant="z"), a_bound_request("2", tenant="a"))
    assert order(queue) == ["1", "2"]


def test_a_tenant_is_not_starved_by_ever_new_ones() -> None:
    queue = a_queue(a_bound_request("old", tenant="z"))
    for number in range(5):
        queue.add(a_bound_request(f"new{number}", tenant=f"a{number}"), inf, inf)
    assert send(queue, 1) == ["old"]


# ---- classes do not starve -------------------------------------------------------------------------------------------


def test_a_class_passed_over_for_too_long_gets_one_turn_and_only_one() -> None:
    low = [a_bound_request(f"low{n}") for n in range(5)]
    high = [a_bound_request(f"high{n}", priority=1, arrived_at=29.0) for n in range(5)]
    queue = a_queue(*low, *high, starve_s=10.0)
    assert order(queue, now=9.9)[0] == "high0"
    assert send(queue, 3, now=30.0) == ["low0", "high0", "high1"]
    assert send(queue, 1, now=35.0) == ["high2"]
    assert send(queue, 2, now=40.0) == ["low1", "high3"]


def test_the_turn_of_a_class_goes_to_one_of_it_that_has_room() -> None:
    low = [a_bound_request(name, arrived_at=at) for name, at in (("a", 0.0), ("b", 1.0), ("c", 2.0))]
    queue = a_queue(*low, a_bound_request("high", priority=1, arrived_at=55.0))
    tried = []
    for request in queue.in_order(now=60.0):
        tried.append(request.id)
        if request.id == "b":  # the engines of `a` are full
            queue.remove("b")
            queue.dispatched(request, 1.0, now=60.0)
    assert tried == ["a", "b", "high", "c"]


@given(st.lists(st.tuples(st.sampled_from([0, 1, 2]), st.booleans()), min_size=1, max_size=80), st.integers(1, 7))
def test_no_class_waits_longer_for_a_turn_than_the_bound_while_one_request_is_sent_each_second(
    arrivals: list[tuple[int, bool]], starve_s: int
) -> None:
    queue = WaitingQueue(200, starve_s=float(starve_s))
    turn_at: dict[tuple[int, bool], float] = {}
    for number, (priority, is_bound) in enumerate(arrivals):
        now = float(number)
        slo = BOUND if is_bound else Slo()
        queue.add(a_request(f"r{number}", arrived_at=now, priority=priority, slo=slo), inf, inf)
        if number % 2 == 0:  # more come than are sent
            continue
        waiting = {(r.priority, r.slo.has_bounds) for r in queue.in_order(now=now)}
        turn_at = {name: turn_at.get(name, now) for name in waiting}
        request = next(queue.in_order(now=now))
        queue.remove(request.id)
        queue.dispatched(request, 1.0, now=now)
        turn_at[request.priority, request.slo.has_bounds] = now
        # One turn takes two seconds here, and the other five classes may be due before it.
        assert all(now - at <= starve_s + 2 * 6 for at in turn_at.values())


# ---- bounds and ends -------------------------------------------------------------------------------------------------


def test_the_bound_holds() -> None:
    queue = WaitingQueue(1)
    queue.add(a_request("a"), until_at=9.0)
    assert queue.is_full
    with pytest.raises(AssertionError):
        queue.add(a_request("b"), until_at=9.0)


def test_waits_end_at_their_own_instants() -> None:
    queue = WaitingQueue(3)
    queue.add(a_request("late"), until_at=9.0)
    queue.add(a_request("soon"), until_at=3.0)
    assert queue.next_end_at() == 3.0
    assert [(ended.request.id, ended.is_late) for ended in queue.remove_ended(3.0)] == [("soon", False)]
    assert queue.next_end_at() == 9.0


def test_a_wait_ends_as_soon_as_it_can_no_longer_help() -> None:
    queue = WaitingQueue(3)
    queue.add(a_request("hopeless"), until_at=9.0, latest_at=2.0)
    assert queue.next_end_at() == 2.0
    assert [(ended.request.id, ended.is_late) for ended in queue.remove_ended(2.0)] == [("hopeless", True)]


@pytest.mark.parametrize(
    ("slo", "at"), [(Slo(), inf), (Slo(tbt_s=0.1), inf), (Slo(ttft_s=3.0, deadline_s=2.0), 7.0), (BOUND, 15.0)]
)
def test_a_request_has_to_start_before_the_first_of_its_bounds_on_time(slo: Slo, at: float) -> None:
    assert latest_start_at(a_request(arrived_at=5.0, slo=slo)) == at


def test_one_that_left_is_not_told_again() -> None:
    queue = WaitingQueue(3)
    queue.add(a_request("a"), until_at=3.0)
    assert queue.remove("a") is not None
    assert queue.remove("a") is None
    assert queue.next_end_at() is None
    assert queue.remove_ended(99.0) == []


def test_one_that_comes_back_with_another_end_is_judged_by_the_new_one() -> None:
    queue = WaitingQueue(3)
    queue.add(a_request("a"), until_at=3.0)
    queue.remove("a")
    queue.add(a_request("a"), until_at=8.0)
    assert queue.remove_ended(5.0) == []
    assert "a" in queue


def test_those_who_leave_early_leave_nothing_behind() -> None:
    queue = WaitingQueue(3)
    for number in range(10_000):
        queue.add(a_request(f"r{number}", tenant=f"t{number}", model=f"m{number}"), until_at=1e9)
        queue.remove(f"r{number}")
    assert len(queue._ends) <= 66
    assert queue.group_count == 0
    assert not queue._classes


# ---- who has to go when it is full -----------------------------------------------------------------------------------


def test_best_effort_makes_room_for_a_request_with_a_bound() -> None:
    queue = a_queue(a_request("first"), a_request("last", arrived_at=1.0), a_bound_request("bound"))
    gone = queue.make_room(a_bound_request("new"))
    assert gone is not None
    assert gone.id == "last"
    assert "last" not in queue


def test_the_tenant_with_the_most_waiting_for_its_weight_makes_room_for_one_with_fewer() -> None:
    flood = [a_bound_request(f"flood{n}", tenant="flood") for n in range(4)]
    heavy = [a_bound_request(f"heavy{n}", tenant="heavy") for n in range(5)]
    queue = a_queue(*flood, *heavy, fairness=Fairness({"heavy": 3.0}))
    gone = queue.make_room(a_bound_request("new", tenant="other"))
    assert gone is not None
    assert gone.id == "flood3"


@pytest.mark.parametrize(
    "newcomer",
    [a_bound_request("new", tenant="flood"), a_request("new", tenant="other"), a_bound_request("n", tenant="even")],
    ids=["same tenant", "lower class", "no fewer"],
)
def test_a_newcomer_that_goes_behind_all_displaces_nobody(newcomer: Request) -> None:
    queue = a_queue(
        *(a_bound_request(f"flood{n}", tenant="flood") for n in range(2)), a_bound_request("e", tenant="even")
    )
    assert queue.make_room(newcomer) is None


# ---- against a plain model -------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans(), st.integers(0, 20)), max_size=60))
def test_it_agrees_with_a_plain_dict_under_any_order_of_calls(steps: list[tuple[int, bool, int]]) -> None:
    queue, model = WaitingQueue(10, starve_s=1e9), dict[str, tuple[int, float]]()
    for number, is_add, when in steps:
        name = f"r{number}"
        if is_add and name not in model:
            queue.add(a_request(name, arrived_at=float(number), priority=number % 3), until_at=float(when))
            model[name] = (number, float(when))
        elif not is_add:
            assert (queue.remove(name) is not None) == (model.pop(name, None) is not None)
    assert order(queue) == sorted(model, key=lambda name: (-(model[name][0] % 3), model[name][0]))
    assert queue.next_end_at() == min((end for _, end in model.values()), default=None)
    ended = {ended.request.id for ended in queue.remove_ended(10.0)}
    assert ended == {name for name, (_, end) in model.items() if end <= 10.0}
