"""SMG 1.13's cache-aware routing."""

import random
from dataclasses import replace

import numpy as np
import pytest

from gateway.core.interfaces import PairTable
from gateway.core.types import Report
from gateway.policies.prefix.smg_cache_aware import SmgCacheAware, SmgCacheAwareChooser
from tests.builders import a_dispatch, a_load, a_pair_table, a_request, chosen, hashes

PROMPT = a_request("hit", prompt_tokens=160, block_hashes={16: hashes(*range(1, 11))})
IDLE = Report(0, 0, kv_usage_ratio=0.0)


def table(counts: dict[str, int] | None = None, **reports: Report) -> PairTable:
    reports = {"a": IDLE, "b": IDLE, "c": IDLE, **reports}
    engines = [
        a_load(engine_id, own_count=(counts or {}).get(engine_id, 0), report=report, report_age_s=1.0)
        for engine_id, report in reports.items()
    ]
    return a_pair_table(engines, engines)


def knowing_b(policy: SmgCacheAware | None = None) -> SmgCacheAwareChooser:
    """A chooser that sent the whole prompt to b."""
    chooser = (policy or SmgCacheAware()).start(random.Random(0))
    chooser.dispatched(replace(PROMPT, id="first"), a_dispatch(prefill="b", decode="b"), now=0.0)
    return chooser


@pytest.mark.parametrize(
    ("counts", "spills"),
    [
        ([0, 12, 0], True),  # mean 4: 12 > 6 and 12 > 4 + max(4, 2 sqrt 4 = 4) = 8
        ([0, 7, 2], False),  # mean 3: 7 > 4.5, but 7 <= 3 + max(4, 3.46) = 7
        ([80, 130, 90], False),  # mean 100: 130 > 120, but 130 <= 150
        ([4000, 16100, 4000], True),  # mean 8033: 16100 > 12050 and > 8033 + 64, the cap of 2 sqrt(mean) = 179
    ],
)
def test_the_spill_gate_needs_both_bounds(counts: list[int], spills: bool) -> None:
    assert bool(SmgCacheAware().spills(np.array(counts, dtype=float))[1]) is spills


def test_a_hit_wins_and_a_spill_goes_to_the_shortest_wait() -> None:
    """1 waiting request of 1024 tokens at a: 0.5 s; c waits 0 s."""
    waiting = Report(0, 1, kv_usage_ratio=0.0)
    assert chosen(knowing_b(), PROMPT, table(a=waiting)) == ("b", "b")
    assert chosen(knowing_b(), PROMPT, table({"b": 12}, a=waiting)) == ("c", "c")


def test_a_miss_goes_to_the_shortest_wait() -> None:
    other = a_request(prompt_tokens=160, block_hashes={16: hashes(50, 51)})
    usage = {name: Report(0, 0, kv_usage_ratio=ratio) for name, ratio in (("a", 0.3), ("b", 0.2), ("c", 0.1))}
    assert chosen(knowing_b(), other, table(**usage)) == ("c", "c")


@pytest.mark.parametrize("report", [Report(0, 8, kv_usage_ratio=0.0), Report(0, 0, kv_usage_ratio=0.8)])
def test_an_engine_that_reports_overload_is_vetoed(report: Report) -> None:
    costs = knowing_b().costs(PROMPT, table(b=report), now=0.0)
    assert np.isinf(costs[1])
    assert int(np.argmin(costs)) == 0


def test_a_veto_of_all_is_void() -> None:
    full = Report(0, 8)
    assert chosen(knowing_b(), PROMPT, table(a=full, b=full, c=full)) == ("b", "b")


def test_every_eighth_hit_goes_to_the_engine_with_the_fewest_blocks() -> None:
    """a was sent one block, c none: hit 8 goes to c."""
    chooser = knowing_b()
    one_block = a_request("one", block_hashes={16: hashes(70)})
    chooser.costs(one_block, table(), now=0.0)
    chooser.dispatched(one_block, a_dispatch(prefill="a", decode="a"), now=0.0)
    winners = []
    for number in range(8):
        request = replace(PROMPT, id=f"hit {number}")
        winners.append(chosen(chooser, request, table())[0])
        chooser.dispatched(request, a_dispatch(prefill="b", decode="b"), now=0.0)
    assert winners == ["b"] * 7 + ["c"]
