"""A polynomial in prompt length L and cached length m, as a regression over measurements gives it.

    prefill = a + b (L - m) + c (L**2 - m**2) + d (L - m)**2

Every term grows with L and shrinks with m, so coefficients that are not negative make the whole monotone; a free
polynomial of degree two in (L, m) would dip between its samples. Mooncake (FAST'25, 4.1) predicts with a polynomial
regression on the same two lengths; xLLM's SLO-aware policy with a0 + a1 L + a2 L**2, which is m = 0 here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gateway.core.errors import ConfigError
from gateway.core.interfaces import DecodeOutcome, HandOffOutcome, PrefillOutcome
from gateway.core.types import Engine, Report
from predictors.profile import WEAK_PRIOR


def prefill_terms(prompt_tokens: NDArray[np.float64], cached_tokens: NDArray[np.float64]) -> NDArray[np.float64]:
    """The four terms of each prefill, shape (..., 4): 1, L - m, L**2 - m**2, (L - m)**2."""
    new_tokens = prompt_tokens - cached_tokens
    squares = prompt_tokens**2 - cached_tokens**2
    return np.stack([np.ones_like(new_tokens), new_tokens, squares, new_tokens**2], axis=-1)


def decode_terms(batch: NDArray[np.float64], kv_tokens: NDArray[np.float64]) -> NDArray[np.float64]:
    """The three terms of each decode step, shape (..., 3): 1, batch, KV tokens."""
    return np.stack([np.ones_like(batch), batch, kv_tokens], axis=-1)


@dataclass(frozen=True)
class Polynomial:
    """Predicts from polynomial coefficients, the same for all engines; none may be negative, and not all of a row 0."""

    prefill: tuple[float, float, float, float] = (WEAK_PRIOR.prefill_base_s, WEAK_PRIOR.prefill_s_per_token, 0.0, 0.0)
    """a (s), b (s per token), c and d (s per square token)."""
    decode: tuple[float, float, float] = (
        WEAK_PRIOR.decode_base_s,
        WEAK_PRIOR.decode_s_per_sequence,
        WEAK_PRIOR.decode_s_per_kv_token,
    )
    """Seconds per step, per sequence, per KV token."""
    hand_off: tuple[float, float] = (0.005, 1e-5)
    """Seconds per hand-off, per token."""

    def __post_init__(self) -> None:
        for key, size in (("prefill", 4), ("decode", 3), ("hand_off", 2)):
            row = getattr(self, key)
            if len(row) != size or not all(math.isfinite(value) and value >= 0 for value in row):
                raise ConfigError(f"polynomial.{key}: must be {size} finite numbers >= 0, not {row}")
        if sum(self.prefill) <= 0 or sum(self.decode) <= 0:
            raise ConfigError("polynomial: a prefill and a decode step must take longer than nothing")

    def start(self) -> Polynomial:
        """Itself: it has no state."""
        return self

    def prefill_s(self, engine: Engine, *, prompt_tokens: int, cached_tokens: int) -> float:
        """Seconds of the whole prefill on an idle engine, > 0."""
        length = max(1, prompt_tokens)
        cached = min(max(0, cached_tokens), length - 1)
        base_s, per_token, per_square, per_new_square = self.prefill
        new_tokens = length - cached
        attention_s = per_square * (length * length - cached * cached) + per_new_square * new_tokens * new_tokens
        return base_s + per_token * new_tokens + attention_s

    def decode_step_s(self, engine: Engine, *, batch: int, kv_tokens: int) -> float:
        """Seconds of one decode step, > 0."""
        base_s, per_sequence, per_kv_token = self.decode
        return base_s + per_sequence * max(1, batch) + per_kv_token * max(0, kv_tokens)

    def hand_off_s(
        self, prefills: Sequence[Engine], decodes: Sequence[Engine], *, prompt_tokens: int
    ) -> NDArray[np.float64]:
        """Seconds to move the prompt's KV, the same for each pair, shape (prefills, decodes)."""
        return np.full((len(prefills), len(decodes)), self.hand_off[0] + self.hand_off[1] * max(0, prompt_tokens))

    def observe_prefill(self, outcome: PrefillOutcome) -> None:
        """Ignored: coefficients come from `predictors/fit.py`."""

    def observe_decode(self, outcome: DecodeOutcome) -> None:
        """Ignored: coefficients come from `predictors/fit.py`."""

    def observe_hand_off(self, outcome: HandOffOutcome) -> None:
        """Ignored: coefficients come from `predictors/fit.py`."""

    def observe_report(self, engine: Engine, report: Report) -> None:
        """Ignored: coefficients come from `predictors/fit.py`."""
