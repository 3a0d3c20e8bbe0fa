"""Random: every pair as often as any other."""

import random
from collections import Counter

from gateway.core.types import Role
from gateway.policies.load.random import Random
from tests.builders import a_load, a_pair_table, a_request, chosen


def test_every_pair_comes_up_as_often() -> None:
    """2 x 2 pairs, 2,000 draws: 500 each, standard deviation 19."""
    prefills = [a_load("p1", Role.PREFILL), a_load("p2", Role.PREFILL)]
    pairs = a_pair_table(prefills, [a_load("d1", Role.DECODE), a_load("d2", Role.DECODE)])
    chooser = Random().start(random.Random(1))
    counts = Counter(chosen(chooser, a_request(), pairs) for _ in range(2000))
    assert len(counts) == 4
    assert all(abs(count - 500) < 80 for count in counts.values())
