from __future__ import annotations

import json
import random

import pytest

from predictors.fit import (
    Capacity,
    fit_decode,
    fit_hand_off,
    fit_polynomial,
    fit_prefill,
    fit_profile,
)
from predictors.measurements import DecodeStep, FitError, HandOff, Prefill
from predictors.profile import Quantity, load_profile, parse_profile

TRUTH = load_profile("llama3-70b-8xa800-reference")
HERE = "told by the test"
CAPACITY = Capacity(
    kv_bytes_per_token=Quantity(327_680, HERE),
    kv_capacity_tokens=Quantity(100_000, HERE),
    prefix_cache_tokens=Quantity(100_000, HERE),
    link_base_s=Quantity(0.0, HERE),
    link_bytes_per_s=Quantity(1e9, HERE),
)


def prefills(count: int = 80, *, noise: float = 0.0, outlier_ratio: float = 0.0) -> list[Prefill]:
    rng, measured = random.Random(1), []
    for _ in range(count):
        length = int(rng.uniform(500, 60_000))
        cached = rng.choice([0, length // 2])
        elapsed_s = TRUTH.whole_prefill_s(length, cached) * rng.lognormvariate(0, noise)
        measured.append(Prefill(length, cached, elapsed_s * (30 if rng.random() < outlier_ratio else 1)))
    return measured


def steps(count: int = 60) -> list[DecodeStep]:
    rng = random.Random(2)
    drawn = [(rng.randint(1, 64), rng.randint(1000, 500_000)) for _ in range(count)]
    return [DecodeStep(batch, kv_tokens, TRUTH.decode_s(batch, kv_tokens)) for batch, kv_tokens in drawn]


def test_exact_measurements_give_back_the_coefficients_they_came_from() -> None:
    expected = (TRUTH.prefill_base_s, TRUTH.prefill_s_per_token, TRUTH.prefill_s_per_square_token)
    assert fit_prefill(prefills()).coefficients == pytest.approx(expected, rel=1e-3)
    decode = (TRUTH.decode_base_s, TRUTH.decode_s_per_sequence, TRUTH.decode_s_per_kv_token)
    assert fit_decode(steps()).coefficients == pytest.approx(decode, rel=1e-3)


def test_one_outlier_in_ten_does_not_move_the_fit() -> None:
    fit = fit_prefill(prefills(200, noise=0.05, outlier_ratio=0.1))
    assert fit.coefficients[1] == pytest.approx(TRUTH.prefill_s_per_token, rel=0.05)
    assert fit.median_error_ratio < 0.06


def test_a_fitted_profile_reads_back_and_predicts_like_the_engine_measured() -> None:
    profile = parse_profile(fit_profile("measured", prefills(), steps(), CAPACITY, summary="Of a test."))
    assert profile.whole_prefill_s(20_000, 5000) == pytest.approx(TRUTH.whole_prefill_s(20_000, 5000), rel=1e-3)
    assert profile.decode_s(20, 100_000) == pytest.approx(TRUTH.decode_s(20, 100_000), rel=1e-3)


def test_the_source_of_a_fitted_number_states_the_error_of_the_fit() -> None:
    sheet = json.loads(fit_profile("measured", prefills(noise=0.1), steps(), CAPACITY, summary="Of a test."))
    assert sheet["prefill_s_per_token"]["source"].startswith("Fitted to 80 measurements: median error ")


def test_a_fitted_polynomial_has_its_fourth_term_where_the_data_have() -> None:
    bent = [Prefill(length, 0, 0.01 + 1e-7 * length**2) for length in range(500, 20_500, 500)]
    bent += [Prefill(length, length // 2, 0.01 + 1e-7 * (length / 2) ** 2) for length in range(500, 20_500, 500)]
    assert fit_polynomial(bent, steps()).prefill == pytest.approx((0.01, 0.0, 0.0, 1e-7), rel=1e-3, abs=1e-9)


@pytest.mark.parametrize(
    ("measured", "complaint"),
    [
        (prefills(5), "at least 12"),
        ([Prefill(1000, 0, 0.1)] * 30, "1 distinct"),
        ([Prefill(1000 + number, 0, 0.1) for number in range(30)], "2 times"),
        ([Prefill(1000 * (1 + number), 0, 0.1) for number in range(30)], "do not grow"),
        ([Prefill(1000 * (1 + number), 0, 10.0 ** (number % 4)) for number in range(30)], "misses its own data"),
    ],
)
def test_prefills_from_which_nothing_follows_are_refused(measured: list[Prefill], complaint: str) -> None:
    with pytest.raises(FitError, match=complaint):
        fit_prefill(measured)


def test_steps_whose_batch_and_kv_change_together_are_refused() -> None:
    together = [DecodeStep(batch, 1000 * batch, 0.01 + 0.001 * batch) for batch in range(1, 40)]
    with pytest.raises(FitError, match="only ever change together"):
        fit_decode(together)


def test_a_hand_off_is_what_is_left_after_the_decode_step_it_includes() -> None:
    lengths = range(200, 8200, 500)
    timed = [HandOff(length, 0.004 + 2e-6 * length + TRUTH.decode_s(1, length)) for length in lengths]
    assert fit_hand_off(timed, fit_decode(steps())).coefficients == pytest.approx((0.004, 2e-6), rel=1e-2)


def test_hand_offs_of_one_length_are_refused() -> None:
    with pytest.raises(FitError, match="1 distinct prompt lengths"):
        fit_hand_off([HandOff(100, 1.0)] * 20, fit_decode(steps()))
