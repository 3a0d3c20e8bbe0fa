"""From measurements of an engine to a profile: a robust regression that refuses data from which nothing follows.

Errors are taken relative to the time measured, so that a short prompt counts as much as a long one; outliers lose their
weight round by round (iteratively reweighted least squares with Huber's weights); coefficients cannot be negative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LinearRegression

from predictors.measurements import DecodeStep, FitError, HandOff, Prefill
from predictors.polynomial import Polynomial, decode_terms, prefill_terms
from predictors.profile import Measured, Quantity

MIN_MEASUREMENTS = 12
MIN_DISTINCT = 3
"""Lengths (or batches, or KV sizes) below which a base, a slope and a curve cannot be told apart."""
MIN_SPAN_RATIO = 2.0
MAX_MEDIAN_ERROR_RATIO = 0.5
"""A fit that misses half of its own data by more than half explains nothing."""
MIN_GROWTH_RATIO = 0.05
"""A longest prefill of which less than this is due to its length was not measured long enough."""
MIN_MOVED_RATIO = 0.1
"""Of a measured hand-off, the part that is at least taken as the transfer itself."""
ROUNDS = 20
HUBER_LIMIT = 1.345
"""Robust standard deviations beyond which a point loses weight. Source: 95 % efficiency at the normal (Huber, 1981)."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Coefficients and how well they explain the data they come from."""

    coefficients: tuple[float, ...]
    median_error_ratio: float
    p95_error_ratio: float
    measurement_count: int

    @property
    def source(self) -> str:
        """The sentence a profile gives as the source of its numbers."""
        return (
            f"Fitted to {self.measurement_count} measurements: "
            f"median error {self.median_error_ratio:.1%}, p95 {self.p95_error_ratio:.1%}."
        )


def fit_prefill(prefills: Sequence[Prefill], *, has_curve: bool = False) -> Fit:
    """Base (s), s per uncached token, s per square token; with `has_curve` also s per square uncached token.

    FitError when the lengths measured cannot tell these apart, or when longer prompts did not take longer.
    """
    length = np.array([prefill.prompt_tokens for prefill in prefills], dtype=float)
    cached = np.array([prefill.cached_tokens for prefill in prefills], dtype=float)
    seconds = np.array([prefill.elapsed_s for prefill in prefills])
    _check_variety("prefill", "uncached lengths", length - cached)
    terms = prefill_terms(length, cached)[:, : 4 if has_curve else 3]
    fit = _regress("prefill", terms, seconds)
    if (terms[:, 1:] @ fit.coefficients[1:] < MIN_GROWTH_RATIO * seconds).all():
        raise FitError("prefill: times do not grow with length; was the prefix cache on, or the prompts too short?")
    return fit


def fit_decode(steps: Sequence[DecodeStep]) -> Fit:
    """Base (s), s per sequence and s per KV token of a step. FitError when batch and KV size cannot be told apart."""
    batch = np.array([step.batch for step in steps], dtype=float)
    kv_tokens = np.array([step.kv_tokens for step in steps], dtype=float)
    _check_variety("decode", "batches", batch)
    _check_variety("decode", "KV sizes", kv_tokens)
    if np.linalg.matrix_rank(decode_terms(batch / batch.max(), kv_tokens / kv_tokens.max()), tol=1e-6) < 3:
        raise FitError("decode: batch and KV tokens only ever change together; measure one batch at two KV sizes")
    return _regress("decode", decode_terms(batch, kv_tokens), np.array([step.step_s for step in steps]))


def fit_hand_off(hand_offs: Sequence[HandOff], decode: Fit) -> Fit:
    """Base (s) and s per token of moving a prompt's KV; `decode` is the fitted step that each measured time includes.

    FitError when the lengths measured cannot tell the two apart.
    """
    length = np.array([hand_off.prompt_tokens for hand_off in hand_offs], dtype=float)
    _check_variety("hand-off", "prompt lengths", length)
    step_s = decode_terms(np.ones(len(length)), length) @ decode.coefficients
    whole_s = np.array([hand_off.hand_off_s for hand_off in hand_offs])
    # A transfer as short as the noise of the step is not negative.
    moved_s = np.maximum(whole_s - step_s, MIN_MOVED_RATIO * whole_s)
    return _regress("hand-off", np.stack((np.ones(len(length)), length), axis=1), moved_s)


def fit_polynomial(prefills: Sequence[Prefill], steps: Sequence[DecodeStep]) -> Polynomial:
    """The polynomial predictor that explains the measurements best."""
    base_s, per_token, per_square, per_new_square = fit_prefill(prefills, has_curve=True).coefficients
    per_step, per_sequence, per_kv_token = fit_decode(steps).coefficients
    return Polynomial(
        prefill=(base_s, per_token, per_square, per_new_square), decode=(per_step, per_sequence, per_kv_token)
    )


@dataclass(frozen=True, slots=True)
class Capacity:
    """What timing cannot tell of an engine and a profile has to state, each with its source."""

    kv_bytes_per_token: Quantity
    kv_capacity_tokens: Quantity
    prefix_cache_tokens: Quantity
    link_base_s: Quantity
    link_bytes_per_s: Quantity
    chunk_tokens: Quantity | None = None


def fit_profile(
    name: str,
    prefills: Sequence[Prefill],
    steps: Sequence[DecodeStep],
    capacity: Capacity,
    *,
    summary: str,
    how: str = "",
) -> bytes:
    """A measured profile as JSON text for `parse_profile`.

    Every fitted number's source states the error of the fit and, in the sentence `how`, where the data come from.
    """
    prefill, decode = fit_prefill(prefills), fit_decode(steps)
    base_s, per_token, per_square = (
        Quantity(value, f"{prefill.source} {how}".strip()) for value in prefill.coefficients
    )
    step_s, per_sequence, per_kv_token = (
        Quantity(value, f"{decode.source} {how}".strip()) for value in decode.coefficients
    )
    sheet = Measured(
        name=name,
        summary=summary,
        prefill_base_s=base_s,
        prefill_floor_s=Quantity(0.0, "Contained in the fitted base."),
        prefill_s_per_token=per_token,
        prefill_s_per_square_token=per_square,
        decode_base_s=step_s,
        decode_s_per_sequence=per_sequence,
        decode_s_per_kv_token=per_kv_token,
        kv_bytes_per_token=capacity.kv_bytes_per_token,
        kv_capacity_tokens=capacity.kv_capacity_tokens,
        prefix_cache_tokens=capacity.prefix_cache_tokens,
        link_base_s=capacity.link_base_s,
        link_bytes_per_s=capacity.link_bytes_per_s,
        chunk_tokens=capacity.chunk_tokens,
    )
    sheet.profile()
    return msgspec.json.format(msgspec.json.encode(sheet), indent=2) + b"\n"


def _check_variety(stage: str, what: str, values: NDArray[np.float64]) -> None:
    if len(values) < MIN_MEASUREMENTS:
        raise FitError(f"{stage}: {len(values)} measurements; at least {MIN_MEASUREMENTS} are needed")
    distinct = np.unique(values)
    if len(distinct) < MIN_DISTINCT:
        raise FitError(f"{stage}: {len(distinct)} distinct {what}; at least {MIN_DISTINCT} are needed")
    if distinct[-1] < MIN_SPAN_RATIO * distinct[0]:
        raise FitError(f"{stage}: the largest of the {what} must be at least {MIN_SPAN_RATIO:g} times the smallest")


def _regress(stage: str, terms: NDArray[np.float64], seconds: NDArray[np.float64]) -> Fit:
    """Relative-error regression with Huber weights and coefficients >= 0; terms have shape (n, coefficients)."""
    size = np.abs(terms).max(axis=0)
    size[size == 0.0] = 1.0
    rows = terms / size / seconds[:, None]
    ones = np.ones(len(seconds))
    weights = ones
    model = LinearRegression(fit_intercept=False, positive=True)
    for _ in range(ROUNDS):
        errors = np.abs(model.fit(rows, ones, sample_weight=weights).predict(rows) - 1.0)
        # 1.4826 x the median absolute deviation estimates a standard deviation; the floor keeps exact data exact.
        limit = HUBER_LIMIT * max(1.4826 * float(np.median(errors)), 1e-9)
        weights = np.minimum(1.0, limit / np.maximum(errors, 1e-12))
    fit = Fit(
        coefficients=tuple(float(value) for value in model.coef_ / size),
        median_error_ratio=float(np.median(errors)),
        p95_error_ratio=float(np.quantile(errors, 0.95)),
        measurement_count=len(seconds),
    )
    if fit.median_error_ratio > MAX_MEDIAN_ERROR_RATIO:
        raise FitError(f"{stage}: the fit misses its own data by {fit.median_error_ratio:.0%} in the median")
    return fit
