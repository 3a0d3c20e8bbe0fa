"""Picking at random, so that the lowest cost is the ticket drawn."""

import random

import numpy as np

from gateway.policies.lottery import draw_order, draw_weighted


def test_an_order_is_a_permutation() -> None:
    assert sorted(draw_order(random.Random(1), 5)) == [0, 1, 2, 3, 4]


def test_draws_are_in_proportion_to_their_weights() -> None:
    """Weights 1 and 3: the second wins three quarters of 4,000 draws, standard error 0.007."""
    rng = random.Random(1)
    wins = [int(np.argmin(draw_weighted(rng, np.array([1.0, 3.0])))) for _ in range(4000)]
    assert abs(wins.count(1) / 4000 - 0.75) < 0.03


def test_weight_zero_is_excluded() -> None:
    assert list(np.isinf(draw_weighted(random.Random(1), np.array([0.0, 2.0])))) == [True, False]
