"""The waiting queue: arrival order, bounded, each wait with an end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.waiting import WaitingQueue
from tests.builders import a_request


def test_requests_are_given_in_the_order_they_arrived_whenever_they_were_added() -> None:
    queue = WaitingQueue(3)
    for name, arrived_at in (("b", 2.0), ("a", 1.0), ("c", 1.0)):
        queue.add(a_request(name, arrived_at=arrived_at), until_at=9.0)
    assert [request.id for request in queue] == ["a", "c", "b"]


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
    assert [request.id for request in queue.remove_ended(3.0)] == ["soon"]
    assert queue.next_end_at() == 9.0


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


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans(), st.integers(0, 20)), max_size=60))
def test_it_agrees_with_a_plain_dict_under_any_order_of_calls(steps: list[tuple[int, bool, int]]) -> None:
    queue, model = WaitingQueue(10), dict[str, tuple[int, float]]()
    for number, is_add, when in steps:
        name = f"r{number}"
        if is_add and name not in model:
            queue.add(a_request(name, arrived_at=float(number)), until_at=float(when))
            model[name] = (number, float(when))
        elif not is_add:
            assert (queue.remove(name) is not None) == (model.pop(name, None) is not None)
    assert [request.id for request in queue] == sorted(model, key=lambda name: model[name][0])
    assert queue.next_end_at() == min((end for _, end in model.values()), default=None)
    ended = {request.id for request in queue.remove_ended(10.0)}
    assert ended == {name for name, (_, end) in model.items() if end <= 10.0}
