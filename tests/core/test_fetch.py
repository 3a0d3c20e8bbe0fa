"""Second rows for pairs that can fetch a longer prefix from another engine."""

from dataclasses import replace

import numpy as np
import pytest

from gateway.core.cluster import Cluster
from gateway.core.estimate import estimate_at, estimate_pairs
from gateway.core.interfaces import PairTable
from gateway.core.types import Engine, Estimate, Role
from predictors.online import Online
from tests.builders import a_request, an_engine

REQUEST = a_request(prompt_tokens=4000)


def a_prefill(engine_id: str, pool: str = "default", can_share_prefixes: bool = True) -> Engine:
    return an_engine(engine_id, Role.PREFILL, pool=pool, can_share_prefixes=can_share_prefixes)


def table(*prefills: Engine, cached: dict[str, int]) -> PairTable:
    cluster = Cluster()
    for engine in (*prefills, an_engine("d", Role.DECODE), an_engine("e", Role.DECODE, pool="other")):
        cluster.found(engine)
    loads = list(cluster.loads(0.0))
    tokens = np.array([cached.get(load.engine.id, 0) for load in loads], dtype=np.int64)
    return estimate_pairs(REQUEST, loads, Online().start(), tokens)


def fetches(pairs: PairTable) -> list[Estimate]:
    estimates = [estimate_at(pairs, row) for row in range(len(pairs))]
    return [estimate for estimate in estimates if estimate.fetch_from is not None]


def test_every_engine_that_holds_less_may_fetch_from_the_one_that_holds_most() -> None:
    pairs = table(a_prefill("p1"), a_prefill("p2"), a_prefill("p3"), cached={"p1": 500, "p2": 3000})
    found = [(e.prefill, e.fetch_from, e.fetched_tokens, e.cached_tokens) for e in fetches(pairs)]
    assert found == [("p1", "p2", 2500, 3000), ("p3", "p2", 3000, 3000)]
    assert list(pairs.held_tokens) == [500, 3000, 0, 500, 0]


def test_rows_that_fetch_follow_all_the_others() -> None:
    pairs = table(a_prefill("p1"), a_prefill("p2"), cached={"p2": 3000})
    assert list(pairs.prefill_row) == [0, 1, 0]
    assert list(pairs.fetch_row) == [-1, -1, 1]


def test_a_fetch_costs_its_transfer_and_saves_prefill() -> None:
    own, _, fetched = (estimate_at(table(a_prefill("p1"), a_prefill("p2"), cached={"p2": 3000}), r) for r in range(3))
    estimator = Online().start()
    transfer_s = estimator.hand_off_s([a_prefill("p2")], [a_prefill("p1")], prompt_tokens=3000)[0, 0]
    prefill_s = estimator.prefill_s(a_prefill("p1"), prompt_tokens=4000, cached_tokens=3000)
    assert fetched == replace(
        own,
        fetch_s=pytest.approx(transfer_s),
        prefill_s=pytest.approx(prefill_s),
        cached_tokens=3000,
        fetch_from="p2",
        fetched_tokens=3000,
    )


def test_nothing_is_fetched_across_pools_or_between_engines_that_cannot_share() -> None:
    assert not fetches(table(a_prefill("p1"), a_prefill("p2", pool="other"), cached={"p2": 3000}))
    assert not fetches(table(a_prefill("p1"), a_prefill("p2", can_share_prefixes=False), cached={"p2": 3000}))
    assert not fetches(table(a_prefill("p1", can_share_prefixes=False), a_prefill("p2"), cached={"p2": 3000}))


def test_equal_holders_fetch_nothing() -> None:
    assert not fetches(table(a_prefill("p1"), a_prefill("p2"), cached={"p1": 3000, "p2": 3000}))
