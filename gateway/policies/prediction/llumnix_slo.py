"""Llumnix's SLO routing: drop the engines predicted beyond 85 % of the SLO, then the lowest prediction."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from gateway.core.interfaces import PairTable
from gateway.core.types import Dispatch, Request
from gateway.policies.stage import Costs, predicted_tbt, prefill_then_decode


@dataclass(frozen=True, slots=True)
class LlumnixSlo:
    """Prefill: lowest TTFT of at most 0.85 x 6 s. Decode: lowest TPOT of at most 0.85 x 50 ms.

    Llumnix interpolates medians of a profile; here the gateway's predictor predicts. It refuses when no engine is
    left; a policy cannot refuse: the lowest prediction of all is taken then. Its migrations and its packing of engines
    that change roles are not a gateway's. Source: baseline-policies section 5.5.
    """

    target_ttft_s: float = 6.0
    target_tpot_s: float = 0.050
    margin_ratio: float = 0.85

    def start(self, rng: random.Random) -> LlumnixSlo:
        return self

    def costs(self, request: Request, pairs: PairTable, *, now: float) -> Costs:
        """By predicted TTFT for prefill, then predicted TPOT for decode; +inf beyond the margin; shape (pairs,)."""
        return prefill_then_decode(
            pairs,
            lambda stage: self._within(stage.compute_s, self.target_ttft_s),
            lambda stage: self._within(predicted_tbt(stage), self.target_tpot_s),
        )

    def dispatched(self, request: Request, dispatch: Dispatch, *, now: float) -> None:
        """Nothing to remember."""

    def _within(self, predicted_s: Costs, target_s: float) -> Costs:
        """The predictions, +inf for those beyond the margin; as they are when all are."""
        is_over = predicted_s > self.margin_ratio * target_s
        return predicted_s if is_over.all() else np.where(is_over, np.inf, predicted_s)
