"""Mooncake's local cache-aware rule."""

import random

from gateway.core.types import Role
from gateway.policies.prediction.mooncake_local import MooncakeLocal
from tests.builders import a_load, a_pair_table, a_request, chosen


def test_the_lowest_queue_plus_prefill_then_the_lowest_tbt() -> None:
    """p1: 2.0 + 0.5 = 2.5 s with its long prefix; p2: 1.0 + 1.4 = 2.4 s."""
    pairs = a_pair_table(
        [a_load("p1", Role.PREFILL), a_load("p2", Role.PREFILL)],
        [a_load("d1", Role.DECODE), a_load("d2", Role.DECODE)],
        wait_s={"p1": 2.0, "p2": 1.0},
        prefill_s={"p1": 0.5, "p2": 1.4},
        tbt_s={"d1": 0.06, "d2": 0.04},
    )
    assert chosen(MooncakeLocal().start(random.Random(0)), a_request(), pairs) == ("p2", "d2")
