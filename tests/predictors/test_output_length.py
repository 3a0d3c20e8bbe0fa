from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.errors import ConfigError
from predictors.output_length import LengthHistory, OutputLengths

CHAT = ("llama", "tenant", "chat")


def history(lengths: list[int], **settings: float) -> LengthHistory:
    started = OutputLengths(**{"min_requests": 1} | settings).start()  # type: ignore[arg-type]
    for length in lengths:
        started.observe(CHAT, length)
    return started


def test_expected_rest_is_the_trapezoid_over_generated_the_longer_lengths_and_the_cap() -> None:
    lengths = history([100, 200, 300], tail_ratio=float("inf"), cap_tokens=500)
    # Quantiles 150, 200, 300, 500 equally spaced: (75 + 200 + 300 + 250) / 3 = 275; less the 150 generated.
    assert lengths.remaining_tokens(CHAT, [150]) == pytest.approx([125])


def test_survival_runs_linearly_through_the_lengths_still_possible() -> None:
    lengths = history([100, 200, 300], tail_ratio=float("inf"), cap_tokens=500)
    survival = lengths.survival(CHAT, [150], [0, 25, 50, 150, 250, 350, 1000])
    assert survival[0] == pytest.approx([1, 5 / 6, 2 / 3, 1 / 3, 1 / 6, 0, 0])


def test_the_tail_ends_at_a_multiple_of_the_longest_seen() -> None:
    lengths = history([100, 200], tail_ratio=1.5)
    assert lengths.survival(CHAT, [0], [299, 300])[0] == pytest.approx([1 / 300, 0])
    assert lengths.remaining_tokens(CHAT, [1000]) == pytest.approx([250])


def test_a_request_s_own_limit_ends_its_law() -> None:
    lengths = history([100, 200, 300])
    assert lengths.survival(CHAT, [0, 0], [120], limit_tokens=[120, np.inf])[:, 0].tolist() == [0.0, pytest.approx(0.7)]
    assert lengths.remaining_tokens(CHAT, [90], limit_tokens=[100])[0] <= 10


def test_the_narrowest_group_with_enough_requests_speaks() -> None:
    lengths = OutputLengths(min_requests=10).start()
    for _ in range(10):
        lengths.observe(("llama", "a", "chat"), 1000)
        lengths.observe(("llama", "b", "code"), 10)
    few = lengths.remaining_tokens(("llama", "b", "other"), [0])[0]
    assert few == lengths.remaining_tokens(("llama", "b"), [0])[0]
    assert few < 20 < lengths.remaining_tokens(("llama", "c"), [0])[0]


def test_with_nothing_seen_the_mean_is_the_cold_one() -> None:
    assert OutputLengths().start().remaining_tokens(CHAT, [0])[0] == pytest.approx(256, rel=0.05)


def test_old_lengths_are_forgotten() -> None:
    lengths = history([1000] * 300 + [10] * 200)
    assert lengths.remaining_tokens(CHAT, [0])[0] < 11


def test_groups_are_bounded() -> None:
    lengths = OutputLengths(max_groups=4, min_requests=1).start()
    for number in range(100):
        lengths.observe((f"model{number}",), 5000)
    assert lengths.remaining_tokens(("model0",), [0])[0] == pytest.approx(256, rel=0.05)
    assert lengths.remaining_tokens(("model99",), [0])[0] > 2000


def test_expected_rest_matches_what_is_left_of_a_long_lognormal_history() -> None:
    rng = random.Random(1)
    drawn = [int(rng.lognormvariate(5.5, 0.7)) + 1 for _ in range(4000)]
    lengths = history(drawn[:2000], history_requests=2000)
    longer = [length for length in drawn[2000:] if length > 200]
    expected = sum(longer) / len(longer) - 200
    assert lengths.remaining_tokens(CHAT, [200])[0] == pytest.approx(expected, rel=0.1)


@given(
    st.lists(st.integers(0, 5000), max_size=40),
    st.lists(st.integers(0, 20_000), min_size=1, max_size=5),
    st.lists(st.integers(0, 20_000), min_size=1, max_size=8),
    st.sampled_from([1.0, 1.5, float("inf")]),
)
def test_survival_falls_from_one_and_sums_to_the_expected_rest(
    lengths: list[int], generated: list[int], ahead: list[int], tail_ratio: float
) -> None:
    started = history(lengths, tail_ratio=tail_ratio)
    survival = started.survival(CHAT, generated, sorted(ahead))
    assert ((survival >= 0) & (survival <= 1)).all()
    assert (np.diff(survival, axis=1) <= 1e-12).all()
    grid = np.arange(30_001)
    area = started.survival(CHAT, generated, grid)[:, 1:].sum(axis=1)
    assert np.abs(area - started.remaining_tokens(CHAT, generated)).max() <= 1.0


@pytest.mark.parametrize("settings", [{"min_requests": 0}, {"tail_ratio": 0.5}, {"history_requests": 5}])
def test_impossible_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="output_length"):
        OutputLengths(**settings)  # type: ignore[arg-type]
