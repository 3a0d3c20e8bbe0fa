"""llm-d's sticky-until-saturated stack: affinity filter, token-load score, highest score."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np

from gateway.core.interfaces import PairTable
from gateway.core.types import Dispatch, Request
from gateway.policies.llm_d_prefix import LlmDPrefix, LlmDPrefixSettings
from gateway.policies.lottery import draw_order
from gateway.policies.settings import require
from gateway.policies.stage import Costs, Stage, decode_then_prefill, lexicographic


@dataclass(frozen=True, slots=True)
class LlmDSticky:
    """Of the engines that hold 80 % of the prompt the one with the fewest tokens in flight; ties at random.

    Unless it would take 18 s longer than elsewhere, by TTFT = tokens in flight / peak prefill throughput. Decode first,
    then prefill. Tokens in flight: uncached prompt tokens on prefill engines, KV tokens on decode engines.
    Source: baseline-policies section 5.1, the default stack of 2026-08-17: tau = 20,480 tokens/s x 14 s.
    """

    peak_prefill_tokens_per_s: float = 20_480.0
    max_prefill_s: float = 14.0
    """T_max: above throughput x T_max tokens in flight (tau) engines count as equally saturated."""
    prefix: LlmDPrefixSettings = field(default_factory=LlmDPrefixSettings)

    def __post_init__(self) -> None:
        require(self.peak_prefill_tokens_per_s > 0, "peak_prefill_tokens_per_s > 0")
        require(self.max_prefill_s > 0, "max_prefill_s > 0")

    def start(self, rng: random.Random) -> LlmDStickyChooser:
        return LlmDStickyChooser(self, rng)

    def token_load_scores(self, tokens_in_flight: Costs) -> Costs:
        """1 for an idle engine, 0 for a saturated one; shape of the argument: (candidates,)."""
        saturation_tokens = self.peak_prefill_tokens_per_s * self.max_prefill_s
        return 1 - np.minimum(1.0, tokens_in_flight / saturation_tokens)


class LlmDStickyChooser:
    """Remembers the prompts it sent to each engine; the generator breaks ties."""

    def __init__(self, settings: LlmDSticky, rng: random.Random) -> None:
        self._settings = settings
        self._rng = rng
        self._prefix = LlmDPrefix(settings.prefix)

    def costs(self, request: Request, pairs: PairTable, *, now: float) -> Costs:
        """By token load among the engines kept, decode before prefill; +inf for those filtered out; shape (pairs,)."""

        def pick(stage: Stage, tokens: list[int]) -> Costs:
            tokens_in_flight = np.array(tokens, dtype=float)
            ttft_s = tokens_in_flight / self._settings.peak_prefill_tokens_per_s
            is_kept = self._prefix.is_kept(self._prefix.scores(request, stage, now=now), ttft_s)
            scores = self._settings.token_load_scores(tokens_in_flight)
            return np.where(is_kept, lexicographic(-scores, draw_order(self._rng, len(scores))), np.inf)

        return decode_then_prefill(
            pairs,
            lambda stage: pick(stage, [load.kv_tokens for load in stage.loads]),
            lambda stage: pick(stage, [load.queued_tokens for load in stage.loads]),
        )

    def dispatched(self, request: Request, dispatch: Dispatch, *, now: float) -> None:
        self._prefix.dispatched(request, dispatch, now=now)
