"""What every predictor in the table keeps, before and after it has seen anything at all."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.core.errors import ConfigError
from gateway.core.interfaces import DecodeOutcome, Estimator, HandOffOutcome, Predictor, PrefillOutcome
from gateway.core.types import Engine, Role
from predictors import PREDICTORS, predictor
from predictors.analytic import Analytic
from predictors.online import Online
from predictors.profile import load_profile, profile_names

PREFILLS = [Engine(id=f"p{number}", url="http://p", role=Role.PREFILL) for number in range(2)]
DECODES = [Engine(id=f"d{number}", url="http://d", role=Role.DECODE) for number in range(3)]
REFERENCE = Analytic(load_profile("llama3-70b-8xa800-reference"))

ALL: dict[str, Predictor] = {name: predictor(name) for name in PREDICTORS}
ALL |= {f"analytic {name}": Analytic(load_profile(name)) for name in profile_names()}
ALL["online over analytic"] = Online(base=REFERENCE)

tokens = st.integers(0, 2_000_000)
times = st.one_of(st.floats(1e-4, 100.0), st.floats(allow_nan=True, allow_infinity=True))
prefill_outcomes = st.builds(
    PrefillOutcome,
    st.sampled_from(PREFILLS),
    st.integers(1, 2_000_000),
    tokens,
    times,
    times,
    times,
    st.one_of(st.none(), st.just(0.0), times),
)
decode_outcomes = st.builds(
    DecodeOutcome, st.sampled_from(DECODES), st.integers(1, 2048), tokens, st.integers(0, 10_000), times, times
)
hand_off_outcomes = st.builds(
    HandOffOutcome, st.sampled_from(PREFILLS), st.sampled_from(DECODES), st.integers(1, 2_000_000), times
)
histories = st.lists(st.one_of(prefill_outcomes, decode_outcomes, hand_off_outcomes), max_size=60)


def tell(estimator: Estimator, history: list[PrefillOutcome | DecodeOutcome | HandOffOutcome]) -> None:
    for outcome in history:
        if isinstance(outcome, PrefillOutcome):
            estimator.observe_prefill(outcome)
        elif isinstance(outcome, DecodeOutcome):
            estimator.observe_decode(outcome)
        else:
            estimator.observe_hand_off(outcome)


def not_above(first: float, second: float) -> bool:
    """Whether first <= second up to the rounding of a sum."""
    return first <= second * (1 + 1e-12)


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=60, deadline=None)
@given(history=histories, short=st.integers(1, 300_000), more=st.integers(0, 300_000), part=st.floats(0, 1))
def test_prefill_time_is_positive_grows_with_length_and_never_with_the_cache(
    name: str, history: list[PrefillOutcome | DecodeOutcome | HandOffOutcome], short: int, more: int, part: float
) -> None:
    estimator = ALL[name].start()
    tell(estimator, history)
    for engine in PREFILLS:
        cached = int(part * (short - 1))
        base_s = estimator.prefill_s(engine, prompt_tokens=short, cached_tokens=0)
        cached_s = estimator.prefill_s(engine, prompt_tokens=short, cached_tokens=cached)
        longer_s = estimator.prefill_s(engine, prompt_tokens=short + more, cached_tokens=cached)
        assert 0 < cached_s < math.inf
        assert not_above(cached_s, base_s)
        assert not_above(cached_s, longer_s)


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=60, deadline=None)
@given(history=histories, batch=st.integers(1, 1000), kv=tokens, more_batch=st.integers(0, 1000), more_kv=tokens)
def test_step_time_is_positive_and_grows_with_batch_and_kv(
    name: str,
    history: list[PrefillOutcome | DecodeOutcome | HandOffOutcome],
    batch: int,
    kv: int,
    more_batch: int,
    more_kv: int,
) -> None:
    estimator = ALL[name].start()
    tell(estimator, history)
    for engine in DECODES:
        step_s = estimator.decode_step_s(engine, batch=batch, kv_tokens=kv)
        assert 0 < step_s < math.inf
        assert not_above(step_s, estimator.decode_step_s(engine, batch=batch + more_batch, kv_tokens=kv))
        assert not_above(step_s, estimator.decode_step_s(engine, batch=batch, kv_tokens=kv + more_kv))


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=60, deadline=None)
@given(history=histories, short=tokens, more=tokens)
def test_hand_off_time_is_never_negative_grows_with_length_and_has_a_row_per_prefill(
    name: str, history: list[PrefillOutcome | DecodeOutcome | HandOffOutcome], short: int, more: int
) -> None:
    estimator = ALL[name].start()
    tell(estimator, history)
    short_s = estimator.hand_off_s(PREFILLS, DECODES, prompt_tokens=short)
    long_s = estimator.hand_off_s(PREFILLS, DECODES, prompt_tokens=short + more)
    assert short_s.shape == (2, 3)
    assert np.isfinite(long_s).all()
    assert (short_s >= 0).all()
    assert (short_s <= long_s * (1 + 1e-12)).all()
    assert estimator.hand_off_s([], DECODES, prompt_tokens=short).shape == (0, 3)
    assert estimator.hand_off_s(PREFILLS, [], prompt_tokens=short).shape == (2, 0)


@pytest.mark.parametrize("name", ALL)
def test_each_start_is_a_fresh_estimator_that_shares_nothing(name: str) -> None:
    first, second = ALL[name].start(), ALL[name].start()
    before_s = second.prefill_s(PREFILLS[0], prompt_tokens=1000, cached_tokens=0)
    for _ in range(50):
        first.observe_prefill(PrefillOutcome(PREFILLS[0], 1000, 0, 0.0, 50.0, 1.0))
    assert second.prefill_s(PREFILLS[0], prompt_tokens=1000, cached_tokens=0) == before_s


def test_online_is_the_default() -> None:
    assert isinstance(predictor(), Online)


def test_unknown_predictor_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="online, analytic, polynomial, table"):
        predictor("oracle")


def test_unknown_setting_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"predictor\.windows: .* window_outcomes"):
        predictor("online", windows=3)


def test_a_profile_can_be_given_by_name_and_a_base_by_its_settings() -> None:
    reference = predictor("analytic", profile="llama3-70b-8xa800-reference")
    assert reference == REFERENCE
    assert predictor("online", base={"name": "analytic", "profile": "llama3-70b-8xa800-reference"}) == Online(
        base=REFERENCE
    )
