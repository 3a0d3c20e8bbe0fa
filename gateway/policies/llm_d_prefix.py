"""llm-d's approximate prefix scores, and the filter that keeps a request with the engines that know its prefix.

Source: baseline-policies section 5.1 (llm-d-router ebab6879): approximate index, prefix scorer, prefix-cache-affinity
filter. Its exploration probability is 0 by default and left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gateway.core.types import Dispatch, Request
from gateway.policies.approximate_index import ApproximateIndex
from gateway.policies.prompt_blocks import PromptBlocks, prompt_blocks
from gateway.policies.stage import Costs, Stage


@dataclass(frozen=True, slots=True)
class LlmDPrefixSettings:
    """Limits of the index and thresholds of the filter, with llm-d's defaults."""

    min_block_tokens: int = 64
    max_blocks_per_engine: int = 31_250
    max_matched_tokens: int = 131_072
    sticky_score: float = 0.80
    """Engines that hold at least this share of the prompt's blocks are sticky."""
    max_ttft_penalty_s: float = 18.0
    """The sticky engines lose the request when the best of them is slower than the best other by more."""


class LlmDPrefix:
    """Remembers the prompts sent to each engine; scores and filters by them."""

    def __init__(self, settings: LlmDPrefixSettings) -> None:
        self._settings = settings
        self._index = ApproximateIndex()

    def scores(self, request: Request, stage: Stage, *, now: float) -> Costs:
        """Share of the prompt's blocks that each candidate is believed to hold, 0..1, shape (candidates,)."""
        blocks = self._blocks(request)
        matched = self._index.matched_blocks(blocks.hashes, stage.engine_ids, now=now)
        return matched / max(1, len(blocks.hashes))

    def is_kept(self, scores: Costs, ttft_s: Costs) -> NDArray[np.bool_]:
        """Whether each candidate passes the affinity filter, shape of both arguments: (candidates,)."""
        is_sticky: NDArray[np.bool_] = scores >= self._settings.sticky_score
        everyone = np.ones(len(scores), dtype=bool)
        if is_sticky.all() or not is_sticky.any():
            return everyone
        penalty_s = ttft_s[is_sticky].min() - ttft_s[~is_sticky].min()
        if penalty_s > self._settings.max_ttft_penalty_s:
            return everyone
        return is_sticky

    def dispatched(self, request: Request, dispatch: Dispatch, *, now: float) -> None:
        """The prompt joins the blocks of both engines."""
        blocks, estimate = self._blocks(request), dispatch.estimate
        for engine_id in sorted({estimate.prefill, estimate.decode}):
            self._index.insert(engine_id, blocks.hashes, max_blocks=self._settings.max_blocks_per_engine, now=now)

    def _blocks(self, request: Request) -> PromptBlocks:
        settings = self._settings
        return prompt_blocks(
            request, min_block_tokens=settings.min_block_tokens, max_tokens=settings.max_matched_tokens
        )
