from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core import stranded
from gateway.core.stranded import Stranded, StrandedKv


def test_blocks_count_for_each_second_until_the_lease_ends_and_no_longer():
    kv = StrandedKv()
    kv.add("nixl", "p1", blocks=10, hold_s=30.0, now=100.0)
    assert kv.by_connector(now=110.0) == {"nixl": Stranded(1, 10, 100.0, 30.0)}
    assert kv.by_connector(now=130.0) == {"nixl": Stranded(1, 0, 300.0, 30.0)}
    assert kv.by_connector(now=999.0) == {"nixl": Stranded(1, 0, 300.0, 30.0)}


def test_each_connector_is_counted_for_itself():
    kv = StrandedKv()
    kv.add("nixl", "p1", blocks=1, hold_s=30.0, now=0.0)
    kv.add("mooncake", "p2", blocks=2, hold_s=480.0, now=0.0)
    costs = kv.by_connector(now=1000.0)
    assert {name: cost.block_s for name, cost in costs.items()} == {"mooncake": 960.0, "nixl": 30.0}


def test_an_engine_that_dies_holds_nothing_any_more():
    kv = StrandedKv()
    for engine_id in ("p1", "p2"):
        kv.add("nixl", engine_id, blocks=1, hold_s=30.0, now=0.0)
    kv.engine_down("p1", now=10.0)
    assert kv.by_connector(now=50.0) == {"nixl": Stranded(2, 0, 40.0, 30.0)}


def test_what_holds_nothing_costs_nothing():
    kv = StrandedKv()
    kv.add("store", "p1", blocks=5, hold_s=0.0, now=0.0)
    kv.add("nixl", "p1", blocks=0, hold_s=30.0, now=0.0)
    assert kv.by_connector(now=1.0) == {}


def test_only_so_many_are_open_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stranded, "MAX_OPEN", 3)
    kv = StrandedKv()
    for _ in range(5):
        kv.add("nixl", "p1", blocks=1, hold_s=30.0, now=0.0)
    assert kv.by_connector(now=0.0)["nixl"] == Stranded(5, 3, 60.0, 30.0)


@given(st.lists(st.tuples(st.integers(0, 9), st.floats(0, 100), st.floats(0, 50)), max_size=30))
def test_the_count_never_falls_and_never_exceeds_what_was_promised(failures):
    kv = StrandedKv()
    now, seen, most = 0.0, 0.0, 0.0
    for blocks, hold_s, later_s in failures:
        kv.add("x", "p", blocks=blocks, hold_s=hold_s, now=now)
        most += blocks * hold_s
        now += later_s
        cost = kv.by_connector(now=now).get("x")
        if cost is not None:
            assert seen - 1e-6 <= cost.block_s <= most + 1e-6
            seen = cost.block_s
