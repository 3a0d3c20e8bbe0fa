"""Picking at random, so that the lowest of the costs is the ticket drawn."""

from __future__ import annotations

import random

import numpy as np
from numpy.typing import NDArray


def draw_order(rng: random.Random, count: int) -> NDArray[np.float64]:
    """A random order of `count` things: the rank of each, shape (count,)."""
    return np.array(rng.sample(range(count), count), dtype=float)


def draw_weighted(rng: random.Random, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Costs whose lowest is at i with probability weights[i] / sum(weights); weight 0 costs +inf. Shape of `weights`.

    An exponential race: of clocks that ring at rates w_i, clock i rings first with that probability.
    """
    clocks = np.array([rng.expovariate(1.0) for _ in range(len(weights))])
    costs = np.full(len(weights), np.inf)
    np.divide(clocks, weights, out=costs, where=weights > 0)
    return costs
