"""Mooncake's Algorithm 1."""

import random

import numpy as np
import pytest

from gateway.core.interfaces import PairTable
from gateway.core.types import Role
from gateway.policies.prediction.mooncake_global import MooncakeGlobal
from tests.builders import a_load, a_pair_table, a_request, rows_of


def table(own_tokens: int, *, holder_wait_s: float = 3.0, fetch_s: float = 0.2) -> PairTable:
    """p1 computes in 1.0 s, or in 0.4 s after a fetch from p2, which holds 800 tokens, computes in 0.4 s and waits."""
    pairs = a_pair_table(
        [a_load("p1", Role.PREFILL), a_load("p2", Role.PREFILL)],
        [a_load("d1", Role.DECODE)],
        cached={"p1": own_tokens, "p2": 800},
        wait_s={"p2": holder_wait_s},
        prefill_s={"p1": 1.0, "p2": 0.4},
    )
    return rows_of(
        pairs,
        [0, 1, 0],
        fetch_row=[-1, -1, 1],
        cached_tokens=[own_tokens, 800, 800],
        fetched_tokens=[0, 0, 800 - own_tokens],
        fetch_s=[0.0, 0.0, fetch_s],
        prefill_s=[1.0, 0.4, 0.4],
    )


def winner(policy: MooncakeGlobal, pairs: PairTable) -> int:
    return int(np.argmin(policy.start(random.Random(0)).costs(a_request(), pairs, now=0.0)))


def test_the_fetch_wins_over_computing_and_over_waiting_for_the_holder() -> None:
    """Fetch 0.2 + 0.4 = 0.6 s, compute 1.0 s, holder 3.0 + 0.4 = 3.4 s."""
    assert winner(MooncakeGlobal(), table(200)) == 2


def test_the_holder_wins_while_it_is_free() -> None:
    """Holder 0.1 + 0.4 = 0.5 s."""
    assert winner(MooncakeGlobal(), table(200, holder_wait_s=0.1)) == 1


@pytest.mark.parametrize(("own_tokens", "row"), [(200, 2), (201, 0), (0, 2)])
def test_the_threshold_is_on_the_ratio_of_the_prefixes(own_tokens: int, row: int) -> None:
    """Threshold 4: 800 / 200 = 4 fetches, 800 / 201 < 4 computes; nothing of one's own is an infinite ratio."""
    assert winner(MooncakeGlobal(balancing_threshold=4.0), table(own_tokens)) == row


def test_past_the_threshold_computing_is_no_choice_even_if_it_is_faster() -> None:
    """Fetch 2.0 + 0.4 s; computing would take 1.0 s; the holder 3.4 s. Algorithm 1 does not ask."""
    pairs = table(200, fetch_s=2.0)
    costs = MooncakeGlobal().start(random.Random(0)).costs(a_request(), pairs, now=0.0)
    assert np.isinf(costs[0])
    assert int(np.argmin(costs)) == 2
