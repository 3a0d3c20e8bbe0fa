"""llm-d's predicted-latency stack: affinity filter, headroom tiers, latency scores, weighted-random pick."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from gateway.core.interfaces import PairTable
from gateway.core.types import Dispatch, Request
from gateway.policies.llm_d_prefix import LlmDPrefix, LlmDPrefixSettings
from gateway.policies.lottery import draw_weighted
from gateway.policies.settings import require
from gateway.policies.stage import Costs, Stage, decode_then_prefill

EQUAL_RANGE = 1e-9
"""Headrooms whose range is not above this are all the same."""


class Packing(StrEnum):
    """Which of the engines that meet the SLO is best."""

    LEAST = "least"
    """The one with the least headroom: fill engines up."""
    MOST = "most"
    """The one with the most headroom: spread."""


@dataclass(frozen=True, slots=True)
class LlmDPredictedLatency:
    """Decode engine by TPOT headroom, then prefill engine by TTFT headroom; one that does both by both.

    The predictions are this gateway's own, in place of llm-d's trained regressors. As there, an SLO that a request
    does not give counts as 0, so that its headroom is negative everywhere. Left out: the lowest TPOT SLO among the
    requests running on an engine as its bound (the ledger does not tell; the same when all requests have one SLO), and
    the fall-back for missing predictions (there always are some). Source: baseline-policies section 5.1.
    """

    ttft_weight: float = 0.8
    tpot_weight: float = 0.2
    packing: Packing = Packing.LEAST
    explore_negative_ratio: float = 0.01
    """How often the engines that miss the SLO are looked at though some meet it."""
    prefix: LlmDPrefixSettings = field(default_factory=LlmDPrefixSettings)

    def __post_init__(self) -> None:
        require(self.ttft_weight >= 0 and self.tpot_weight >= 0, "weights >= 0")
        require(self.ttft_weight + self.tpot_weight > 0, "ttft_weight + tpot_weight > 0")

    def start(self, rng: random.Random) -> LlmDPredictedLatencyChooser:
        return LlmDPredictedLatencyChooser(self, rng)

    def scores(self, ttft_headroom_s: Costs, tpot_headroom_s: Costs, is_idle: NDArray[np.bool_]) -> Costs:
        """The latency scorer: 0.01..1.01 for the group that is looked at, 0 outside; all shapes (candidates,).

        Engines that meet both bounds; else idle ones; else those that miss only TPOT, only TTFT, or both.
        """
        misses_ttft, misses_tpot = ttft_headroom_s < 0, tpot_headroom_s < 0
        is_positive = ~misses_ttft & ~misses_tpot
        groups = (
            is_positive,
            is_idle,
            ~misses_ttft & misses_tpot,
            misses_ttft & ~misses_tpot,
            misses_ttft & misses_tpot,
        )
        group = next(members for members in groups if members.any())
        ttft, ttft_range = _spread(ttft_headroom_s[group])
        tpot, tpot_range = _spread(tpot_headroom_s[group])
        ttft_weight = self.ttft_weight / (self.ttft_weight + self.tpot_weight)
        if ttft_range <= EQUAL_RANGE < tpot_range:
            ttft_weight = 0.0
        elif tpot_range <= EQUAL_RANGE < ttft_range:
            ttft_weight = 1.0
        combined = ttft_weight * ttft + (1 - ttft_weight) * tpot
        is_most = self.packing is Packing.MOST and is_positive.any()
        scores = np.zeros(len(group))
        scores[group] = (np.floor((combined if is_most else 1 - combined) * 100) + 1) / 100
        return scores


class LlmDPredictedLatencyChooser:
    """Remembers the prompts it sent to each engine; draws by the scores."""

    def __init__(self, settings: LlmDPredictedLatency, rng: random.Random) -> None:
        self._settings = settings
        self._rng = rng
        self._prefix = LlmDPrefix(settings.prefix)

    def costs(self, request: Request, pairs: PairTable, *, now: float) -> Costs:
        """A draw weighted by the scores, decode before prefill; +inf where the score is 0; shape (pairs,)."""
        slo_ttft_s, slo_tpot_s = request.slo.ttft_s or 0.0, request.slo.tbt_s or 0.0
        best_ttft_s = np.full(len(pairs.decodes), np.inf)
        np.minimum.at(best_ttft_s, pairs.decode_row, pairs.ttft_s)

        def decode_rule(stage: Stage) -> Costs:
            ttft_s = best_ttft_s[pairs.decode_row[stage.rows]]
            return self._draw(request, stage, ttft_s, slo_ttft_s - ttft_s, slo_tpot_s - pairs.tbt_s[stage.rows], now)

        def prefill_rule(stage: Stage) -> Costs:
            ttft_s = stage.compute_s
            return self._draw(request, stage, ttft_s, slo_ttft_s - ttft_s, np.zeros(len(stage)), now)

        return decode_then_prefill(pairs, decode_rule, prefill_rule)

    def dispatched(self, request: Request, dispatch: Dispatch, *, now: float) -> None:
        self._prefix.dispatched(request, dispatch, now=now)

    def _draw(
        self, request: Request, stage: Stage, ttft_s: Costs, ttft_headroom_s: Costs, tpot_headroom_s: Costs, now: float
    ) -> Costs:
        """Filters, scores and draws: costs of the candidates, shape (candidates,)."""
        is_kept = self._prefix.is_kept(self._prefix.scores(request, stage, now=now), ttft_s)
        is_positive = is_kept & (ttft_headroom_s >= 0) & (tpot_headroom_s >= 0)
        if is_positive.any():
            is_negative = is_kept & ~is_positive
            explores = is_negative.any() and self._rng.random() < self._settings.explore_negative_ratio
            is_kept = is_negative if explores else is_positive
        scores = np.zeros(len(stage))
        scores[is_kept] = self._settings.scores(
            ttft_headroom_s[is_kept], tpot_headroom_s[is_kept], stage.own_counts[is_kept] == 0
        )
        return draw_weighted(self._rng, scores)


def _spread(headroom_s: Costs) -> tuple[Costs, float]:
    """Sizes of the headrooms scaled to 0..1 (0.5 when all are the same), and their range."""
    size = np.abs(headroom_s)
    size_range = float(np.ptp(size))
    if size_range <= EQUAL_RANGE:
        return np.full(len(size), 0.5), size_range
    return (size - size.min()) / size_range, size_range
