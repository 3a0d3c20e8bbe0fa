"""Pairs and their predictions: one predictor call per engine, sums per pair."""

import numpy as np
import pytest

from gateway.core.cluster import Cluster
from gateway.core.estimate import estimate_at, estimate_pairs
from gateway.core.interfaces import PairTable
from gateway.core.types import Request, Role
from predictors.online import Online
from tests.builders import a_mesh, a_request, an_engine


def table(request: Request, *engines: object, cached: dict[str, int] | None = None) -> PairTable:
    cluster = Cluster()
    for engine in engines:
        cluster.found(engine)
    loads = list(cluster.loads(0.0))
    cached_tokens = np.array([(cached or {}).get(load.engine.id, 0) for load in loads], dtype=np.int64)
    return estimate_pairs(request, loads, Online().start(), cached_tokens)


def pairs_of(pairs: PairTable) -> list[tuple[str, str]]:
    estimates = [estimate_at(pairs, row) for row in range(len(pairs))]
    return [(estimate.prefill, estimate.decode) for estimate in estimates]


def test_pairs_are_sorted_whatever_the_order_in_which_engines_were_found() -> None:
    engines = a_mesh(2, 2)
    expected = [("p1", "d1"), ("p1", "d2"), ("p2", "d1"), ("p2", "d2")]
    assert pairs_of(table(a_request(), *engines)) == expected
    assert pairs_of(table(a_request(), *reversed(engines))) == expected


def test_no_engines_no_pairs() -> None:
    assert len(table(a_request())) == 0
    assert len(table(a_request(), an_engine("p1", Role.PREFILL))) == 0


def test_engines_of_role_both_pair_with_themselves_only() -> None:
    pairs = table(a_request(), an_engine("a"), an_engine("b"), *a_mesh(1, 1))
    assert pairs_of(pairs) == [("a", "a"), ("b", "b"), ("p1", "d1")]


def test_one_engine_needs_no_hand_off_and_no_join() -> None:
    estimate = estimate_at(table(a_request(), an_engine("a")), 0)
    assert (estimate.hand_off_s, estimate.join_s) == (0.0, 0.0)
    assert not estimate.is_hand_off


def test_cached_tokens_shorten_the_prefill_of_the_engine_that_has_them() -> None:
    pairs = table(a_request(prompt_tokens=4000), *a_mesh(2, 1), cached={"p2": 3000})
    assert pairs.prefill_s[1] < pairs.prefill_s[0]
    assert list(pairs.cached_tokens) == [0, 3000]


def test_an_estimate_is_the_sum_of_its_stages() -> None:
    pairs = table(a_request(), *a_mesh(1, 1))
    assert estimate_at(pairs, 0).ttft_s == pytest.approx(float(pairs.ttft_s[0]))
