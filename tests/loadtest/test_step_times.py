"""How long one step takes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.step_times import LinearStepTimes, mixed_step_s

TIMES = LinearStepTimes()
CHUNKS = st.lists(st.tuples(st.integers(1, 8192), st.integers(0, 100_000)), max_size=4)


def test_a_step_of_one_kind_takes_what_its_kind_takes() -> None:
    assert mixed_step_s(TIMES, [(100, 50)], 0, 0) == TIMES.prefill_s(100, 50)
    assert mixed_step_s(TIMES, [], 8, 4000) == TIMES.decode_s(8, 4000)


def test_the_fixed_cost_of_a_step_is_paid_once() -> None:
    together = mixed_step_s(TIMES, [(100, 0), (200, 0)], 4, 100)
    apart = TIMES.prefill_s(100, 0) + TIMES.prefill_s(200, 0) + TIMES.decode_s(4, 100)
    assert together == pytest.approx(apart - 2 * TIMES.fixed_s, rel=0.01)


@given(CHUNKS, st.integers(1, 256), st.integers(0, 10**6))
def test_a_step_is_between_its_longest_part_and_their_sum(
    chunks: list[tuple[int, int]], batch: int, kv_tokens: int
) -> None:
    parts = [TIMES.prefill_s(*chunk) for chunk in chunks] + [TIMES.decode_s(batch, kv_tokens)]
    assert max(parts) <= mixed_step_s(TIMES, chunks, batch, kv_tokens) <= sum(parts) * (1 + 1e-9)
