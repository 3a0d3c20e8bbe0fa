"""production-stack's load-aware score."""

import random

import numpy as np
import pytest

from gateway.core.types import Role
from gateway.policies.prefix.production_stack_load_aware import ProductionStackLoadAware
from gateway.policies.stage import Stage
from tests.builders import a_load, a_pair_table, a_request, chosen

PREFILLS = [a_load(f"p{row}", Role.PREFILL, own_count=count) for row, count in enumerate((6, 2, 1))]
PAIRS = a_pair_table(PREFILLS, [a_load("d0", Role.DECODE, own_count=1), a_load("d1", Role.DECODE)], cached={"p1": 80})


def test_the_score_is_the_matched_share_minus_the_relative_load() -> None:
    """Mean 3: p0 0 - 3/3 = -1; p1 0.8 + 1/3; p2 0 + 2/3."""
    stage = Stage(PAIRS.prefills, np.array([0, 2, 4]), PAIRS)
    scores = ProductionStackLoadAware().scores(a_request(prompt_tokens=100), stage)
    assert list(scores) == pytest.approx([-1.0, 0.8 + 1 / 3, 2 / 3])


def test_the_highest_score_wins_and_decode_goes_by_count() -> None:
    """With beta 4: p1 0.8 + 4/3 = 2.13, p2 8/3 = 2.67."""
    request = a_request(prompt_tokens=100)
    assert chosen(ProductionStackLoadAware().start(random.Random(0)), request, PAIRS) == ("p1", "d1")
    assert chosen(ProductionStackLoadAware(load_weight=4.0).start(random.Random(0)), request, PAIRS) == ("p2", "d1")
