"""The fluid bound on workloads whose best is known by hand."""

from __future__ import annotations

from itertools import chain, combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.types import Slo
from loadtest.fluid import attainable_ratio, best_cached_tokens, demand_of, most
from loadtest.sim_engines import Fleet
from loadtest.workload import TraceRequest
from predictors.profile import Profile

SECOND_PER_THOUSAND = Profile(
    name="a millisecond per token",
    prefill_base_s=0.0,
    prefill_floor_s=0.0,
    prefill_s_per_token=1e-3,
    prefill_s_per_square_token=0.0,
    decode_base_s=0.01,
    decode_s_per_sequence=0.01,
    decode_s_per_kv_token=0.0,
    kv_bytes_per_token=1.0,
    kv_capacity_tokens=10**6,
    prefix_cache_tokens=10**6,
    link_base_s=0.0,
    link_bytes_per_s=1e12,
)
ONE_AND_ONE = Fleet(SECOND_PER_THOUSAND, prefill=1, decode=1)


def burst(count: int, *, prompt: int = 1000, output: int = 1) -> list[TraceRequest]:
    return [TraceRequest(0.0, prompt, output) for _ in range(count)]


def test_a_prefix_counts_as_cached_once_it_was_seen() -> None:
    requests = [TraceRequest(0.0, 1024, 1, ids) for ids in ((1, 2), (1, 3), (1, 2), (4, 2))]
    assert best_cached_tokens(requests) == [0, 512, 1023, 0]


def test_no_more_prefills_fit_than_the_bound_has_seconds() -> None:
    # Ten prompts of a second each, at once, one engine, 5 s: five of them.
    assert attainable_ratio(burst(10), ONE_AND_ONE, Slo(ttft_s=5.0, tbt_s=None)) == pytest.approx(0.5)


def test_the_cheapest_are_counted_first() -> None:
    requests = [*burst(5), *burst(5, prompt=100)]
    assert attainable_ratio(requests, ONE_AND_ONE, Slo(ttft_s=1.5)) == pytest.approx(0.6)


def test_a_prompt_that_alone_takes_too_long_is_missed() -> None:
    requests = [*burst(9, prompt=10), *burst(1, prompt=6000)]
    assert attainable_ratio(requests, ONE_AND_ONE, Slo(ttft_s=5.0)) == pytest.approx(0.9)


def test_decode_steps_hold_only_so_many_sequences() -> None:
    # Steps of 50 ms, 10 of them the base's: 0.8 s of sequences per second, over 10 s and the last one's 5.05 s.
    requests = burst(100, prompt=1, output=101)
    bound = attainable_ratio(requests, ONE_AND_ONE, Slo(ttft_s=10.0, tbt_s=0.05))
    assert bound == pytest.approx(0.8 * 15.05 / 100)


def test_without_bounds_or_requests_all_are_attained() -> None:
    assert attainable_ratio(burst(50), ONE_AND_ONE, Slo()) == 1.0
    assert attainable_ratio([], ONE_AND_ONE, Slo(ttft_s=1.0)) == 1.0


def test_a_step_budget_lets_prompts_share_what_a_step_costs() -> None:
    chunked = Profile(**{**_fields(), "prefill_base_s": 0.1, "chunk_tokens": 1000})
    assert demand_of(burst(1, prompt=100), chunked).prefill_s == pytest.approx([0.1 + 0.01])


costs = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=8)


@given(costs, st.integers(0, 60), st.integers(0, 60))
def test_no_choice_of_requests_passes_the_bound(pairs: list[tuple[int, int]], first: int, second: int) -> None:
    choices = chain.from_iterable(combinations(pairs, size) for size in range(len(pairs) + 1))
    best = max(len(c) for c in choices if sum(a for a, _ in c) <= first and sum(b for _, b in c) <= second)
    table = np.array(pairs, dtype=float)
    assert most(len(pairs), [(table[:, 0], float(first)), (table[:, 1], float(second))]) >= best - 1e-9


def _fields() -> dict[str, object]:
    return {name: getattr(SECOND_PER_THOUSAND, name) for name in SECOND_PER_THOUSAND.__dataclass_fields__}
