"""Of those who wait as many are kept as can be in time, whatever their order; the largest and the least go."""

from __future__ import annotations

from itertools import combinations
from math import inf

from hypothesis import given
from hypothesis import strategies as st

from gateway.admissions.triage import Job, kept


def job(due_s: float, work_s: float, priority: int = 0) -> Job:
    return Job(due_s, work_s, work_s, priority)


def is_feasible(jobs: list[Job], busy_s: float) -> bool:
    """Whether all are in time, done in the order of their due times: if that order cannot do it none can."""
    done_s = busy_s
    for each in sorted(jobs, key=lambda each: each.due_s):
        done_s += each.work_s
        if done_s > each.due_s:
            return False
    return True


def test_everybody_is_kept_where_there_is_time():
    assert kept([job(3, 1), job(1, 1), job(2, 1)], busy_s=0.0) == [True, True, True]


def test_one_long_prompt_goes_rather_than_three_short_ones():
    assert kept([job(4, 4), job(4, 1), job(4, 1), job(4, 1)], busy_s=0.0) == [False, True, True, True]


def test_who_was_told_to_come_now_is_kept_before_others_of_its_class():
    told = Job(4, 4, 4, 0, True)
    assert kept([job(4, 1), told, job(4, 1)], busy_s=0.0) == [False, True, False]
    assert kept([job(4, 1, priority=1), told], busy_s=0.0) == [True, False]


def test_what_the_engines_have_to_do_first_counts():
    jobs = [job(2, 1), job(2, 0.5)]
    assert kept(jobs, busy_s=0.5) == [True, True]
    assert kept(jobs, busy_s=1.0) == [False, True]
    assert kept(jobs, busy_s=5.0) == [False, False]


def test_a_low_priority_goes_before_a_larger_one_of_high_priority():
    assert kept([job(4, 3, priority=1), job(4, 2, priority=0)], busy_s=0.0) == [True, False]


def test_of_equal_work_what_is_worth_less_goes():
    dear, cheap = Job(1.0, 1.0, size=1.0), Job(1.0, 1.0, size=0.5)
    assert kept([dear, cheap], busy_s=0.0) == [False, True]


def test_one_that_is_late_even_alone_takes_nobody_with_it():
    assert kept([job(1, 0.5), job(2, 10, priority=1)], busy_s=0.0) == [True, False]
    assert kept([Job(1, 0.5, size=5.0), Job(2, 10, size=1.0)], busy_s=0.0) == [True, False]


def test_who_has_time_without_end_is_kept():
    assert kept([job(inf, 100.0), job(1.0, 1.0)], busy_s=0.0) == [True, True]
    assert kept([], busy_s=3.0) == []


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)), max_size=9), st.integers(0, 5))
def test_no_choice_keeps_more(sizes: list[tuple[int, int]], busy_s: int) -> None:
    jobs = [job(due_s, work_s) for due_s, work_s in sizes]
    keep = [each for each, is_kept in zip(jobs, kept(jobs, busy_s=busy_s), strict=True) if is_kept]
    assert is_feasible(keep, busy_s)
    most = next(n for n in range(len(jobs), -1, -1) if any(is_feasible(list(c), busy_s) for c in combinations(jobs, n)))
    assert len(keep) == most
