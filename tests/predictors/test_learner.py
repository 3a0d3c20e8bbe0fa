from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from predictors.learner import MIN_S, Learner, Prior, solve_nonnegative

PRIOR = Prior(mean=(0.02, 1e-4), spread=(0.3, 1e-2))


def taught(seconds_per_token: float, *, count: int = 200, seed: int = 1, outlier_ratio: float = 0.0) -> Learner:
    rng = random.Random(seed)
    learner = Learner(PRIOR)
    for _ in range(count):
        tokens = rng.randint(100, 10_000)
        seconds = (0.05 + seconds_per_token * tokens) * rng.lognormvariate(0, 0.05)
        if rng.random() < outlier_ratio:
            seconds *= rng.choice([0.01, 20.0, 100.0])
        learner.observe((1.0, float(tokens)), seconds)
    return learner


def test_an_untaught_learner_believes_its_prior() -> None:
    assert Learner(PRIOR).predict((1.0, 1000.0)) == pytest.approx(0.12)


@pytest.mark.parametrize("seconds_per_token", [1e-6, 1e-4, 1e-2])
def test_a_line_is_learnt_whatever_its_slope(seconds_per_token: float) -> None:
    learner = taught(seconds_per_token)
    assert learner.predict((1.0, 5000.0)) == pytest.approx(0.05 + seconds_per_token * 5000, rel=0.05)


def test_one_outcome_in_ten_off_by_a_hundred_times_hardly_moves_it() -> None:
    learner = taught(1e-4, outlier_ratio=0.1)
    assert learner.predict((1.0, 5000.0)) == pytest.approx(0.55, rel=0.1)


def test_a_doubling_is_followed_within_thirty_outcomes() -> None:
    learner, rng = taught(1e-4), random.Random(2)
    for _ in range(30):
        tokens = rng.randint(100, 10_000)
        learner.observe((1.0, float(tokens)), 2 * (0.05 + 1e-4 * tokens) * rng.lognormvariate(0, 0.05))
    assert learner.predict((1.0, 5000.0)) == pytest.approx(1.1, rel=0.1)


def test_an_heir_believes_the_same_and_is_persuaded_sooner() -> None:
    parent = taught(1e-4)
    child = parent.heir()
    assert child.predict((1.0, 5000.0)) == parent.predict((1.0, 5000.0))
    for _ in range(5):
        parent.observe((1.0, 5000.0), 5.0)
        child.observe((1.0, 5000.0), 5.0)
    assert abs(child.predict((1.0, 5000.0)) - 5.0) < abs(parent.predict((1.0, 5000.0)) - 5.0)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf, 1e9])
def test_a_time_that_cannot_be_is_not_learnt_from(seconds: float) -> None:
    learner = Learner(PRIOR)
    learner.observe((1.0, 1000.0), seconds)
    assert learner.count == 0


def test_predictions_stay_above_nothing_when_everything_was_instant() -> None:
    learner = Learner(PRIOR)
    for _ in range(300):
        learner.observe((1.0, 1e6), 1e-9)
    assert learner.predict((1.0, 1.0)) >= MIN_S


@given(
    st.lists(st.lists(st.floats(-10, 10), min_size=3, max_size=3), min_size=1, max_size=6),
    st.lists(st.floats(-10, 10), min_size=6, max_size=6),
)
def test_the_solver_meets_the_conditions_of_a_nonnegative_minimum(
    rows: list[list[float]], targets: list[float]
) -> None:
    # The identity keeps the problem positive definite, as the prior does.
    matrix = np.array(rows).T @ np.array(rows) + np.eye(3)
    right = np.array(rows).T @ np.array(targets[: len(rows)])
    solution = solve_nonnegative(matrix, right)
    slope = matrix @ solution - right
    assert (solution >= 0).all()
    assert (slope >= -1e-6).all()
    assert solution * slope == pytest.approx(np.zeros(3), abs=1e-5)
