"""AIBrix's prefix-cache routing and its scores for disaggregated engines."""

import random

import numpy as np
import pytest

from gateway.core.types import Report, Role
from gateway.policies.prefix.aibrix_prefix_cache import AibrixPrefixCache, AibrixPrefixCacheChooser
from gateway.policies.stage import Stage
from tests.builders import a_dispatch, a_load, a_pair_table, a_request, chosen, hashes

PROMPT = a_request(prompt_tokens=160, block_hashes={16: hashes(*range(1, 11))})


def a_chooser() -> AibrixPrefixCacheChooser:
    return AibrixPrefixCache().start(random.Random(0))


def order(counts: list[float], matches: list[float]) -> list[float]:
    return list(a_chooser().whole_costs(np.array(counts), np.array(matches)))


def test_the_best_match_within_one_sigma_wins() -> None:
    """Mean 4, sigma 1.41: 5 <= 5.41, the second (0.9) wins. Mean 4, sigma 1.63: 6 > 5.63, the third (0.5) wins."""
    assert np.argmin(order([2.0, 5.0, 5.0], [0.0, 0.9, 0.5])) == 1
    assert np.argmin(order([2.0, 6.0, 4.0], [0.0, 0.9, 0.5])) == 2


def test_imbalance_or_no_match_means_the_fewest_requests() -> None:
    assert np.argmin(order([0.0, 9.0, 1.0], [0.0, 0.0, 1.0])) == 0
    assert np.argmin(order([2.0, 1.0, 3.0], [0.0, 0.0, 0.0])) == 1


def test_the_prefill_score_weighs_ten_percent_of_match_like_the_full_load() -> None:
    """(100 - 40) x 0.1 + 4/4 = 7; (100 - 30) x 0.1 + 1/4 = 7.25."""
    costs = a_chooser().prefill_costs(np.array([4.0, 1.0]), np.array([0.4, 0.3]))
    assert list(costs) == pytest.approx([7.0, 7.25])


def test_the_decode_score_is_load_and_slowness_over_free_kv() -> None:
    """d1: (2/4 + 1 - 50/100) / (0.4/0.8) = 2. d2: (4/4 + 1 - 100/100) / (0.8/0.8) = 1."""
    reports = {"d1": Report(0, 0, kv_usage_ratio=0.6, gen_tokens_per_s=50.0)}
    reports["d2"] = Report(0, 0, kv_usage_ratio=0.2, gen_tokens_per_s=100.0)
    loads = [a_load(name, Role.DECODE, own_count=2 * row, report=reports[name]) for row, name in ((1, "d1"), (2, "d2"))]
    pairs = a_pair_table([a_load("p1", Role.PREFILL)], loads)
    assert list(a_chooser().decode_costs(Stage(pairs.decodes, np.array([0, 1]), pairs))) == pytest.approx([2.0, 1.0])


def test_silent_and_full_engines_have_finite_scores() -> None:
    loads = [a_load("d1", Role.DECODE, report=Report(0, 0, kv_usage_ratio=1.0)), a_load("d2", Role.DECODE)]
    pairs = a_pair_table([a_load("p1", Role.PREFILL)], loads)
    assert list(a_chooser().decode_costs(Stage(pairs.decodes, np.array([0, 1]), pairs))) == pytest.approx([1000.0, 1.0])


def test_what_was_sent_matches_for_20_minutes() -> None:
    pairs = a_pair_table([a_load("p1", Role.PREFILL), a_load("p2", Role.PREFILL)], [a_load("d1", Role.DECODE)])
    chooser = a_chooser()
    chooser.dispatched(PROMPT, a_dispatch(prefill="p2", decode="d1"), now=0.0)
    assert chosen(chooser, PROMPT, pairs, now=1200.0) == ("p2", "d1")
    assert chosen(chooser, PROMPT, pairs, now=1201.0) == ("p1", "d1")
