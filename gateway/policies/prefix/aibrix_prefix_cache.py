"""AIBrix's prefix-cache routing, and its scores for prefill and decode engines."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from gateway.core.interfaces import PairTable
from gateway.core.types import Dispatch, Request
from gateway.policies.approximate_index import ApproximateIndex
from gateway.policies.prompt_blocks import prompt_blocks
from gateway.policies.stage import Costs, Stage, lexicographic, prefill_then_decode

FULL_KV_RATIO = 0.999
"""A full engine's free share would divide by zero: the last thousandth counts as free."""


@dataclass(frozen=True, slots=True)
class AibrixPrefixCache:
    """Engines that do both: fewest requests when imbalanced, else the best match that is not overloaded.

    both:    max r - min r > 8 -> fewest r; else highest match among r <= mean + sigma
             (ties: fewest r); no match -> fewest r
    prefill: lowest (100 - match %) 0.1 + r / max r
    decode:  lowest (r / max r + 1 - throughput / max throughput) / (free KV / max free KV)

    with r the requests of ours in flight. An engine that does not report throughput or KV usage counts as 0 for both.
    The index holds what was sent, 200,000 blocks of at least 16 tokens per engine, for 20 minutes.
    Source: baseline-policies section 5.3; limits of the index: AIBrix's `prefixcacheindexer` and its documentation.
    """

    imbalance_count: int = 8
    sigma_factor: float = 1.0
    prefill_match_weight: float = 0.1
    """Per percentage point of the prompt that does not match."""
    block_tokens: int = 16
    max_blocks_per_engine: int = 200_000
    keep_s: float = 1200.0

    def start(self, rng: random.Random) -> AibrixPrefixCacheChooser:
        return AibrixPrefixCacheChooser(self)


class AibrixPrefixCacheChooser:
    """Remembers the prompts it sent to each engine."""

    def __init__(self, settings: AibrixPrefixCache) -> None:
        self._settings = settings
        self._index = ApproximateIndex(keep_s=settings.keep_s)

    def costs(self, request: Request, pairs: PairTable, *, now: float) -> Costs:
        """By AIBrix's scores, prefill before decode, shape (pairs,)."""

        def prefill_rule(stage: Stage) -> Costs:
            match_ratio = self._match_ratio(request, stage, now)
            if stage.does_both.all():
                return self.whole_costs(stage.own_counts, match_ratio)
            return self.prefill_costs(stage.own_counts, match_ratio)

        return prefill_then_decode(pairs, prefill_rule, self.decode_costs)

    def dispatched(self, request: Request, dispatch: Dispatch, *, now: float) -> None:
        """The prompt joins the prefill engine's blocks."""
        settings = self._settings
        blocks = prompt_blocks(request, min_block_tokens=settings.block_tokens)
        self._index.insert(dispatch.estimate.prefill, blocks.hashes, max_blocks=settings.max_blocks_per_engine, now=now)

    def whole_costs(self, counts: Costs, match_ratio: Costs) -> Costs:
        """Order of engines that do both stages, from requests in flight and matched share; shape (candidates,)."""
        if counts.max() - counts.min() > self._settings.imbalance_count:
            return counts
        is_match = (match_ratio > 0) & (counts <= counts.mean() + self._settings.sigma_factor * counts.std())
        return lexicographic(-np.where(is_match, match_ratio, 0.0), counts)

    def prefill_costs(self, counts: Costs, match_ratio: Costs) -> Costs:
        """Cost of the prefill on each candidate, shape (candidates,)."""
        unmatched_percent = 100 * (1 - match_ratio)
        costs: Costs = unmatched_percent * self._settings.prefill_match_weight + counts / max(1.0, counts.max())
        return costs

    def decode_costs(self, stage: Stage) -> Costs:
        """Cost of the decode on each candidate, shape (candidates,)."""
        counts = stage.own_counts
        reports = [load.report for load in stage.loads]
        speed = np.array([(report and report.gen_tokens_per_s) or 0.0 for report in reports])
        usage = np.array([(report and report.kv_usage_ratio) or 0.0 for report in reports])
        free = 1 - np.minimum(usage, FULL_KV_RATIO)
        speed_ratio = speed / speed.max() if speed.any() else speed
        costs: Costs = (counts / max(1.0, counts.max()) + 1 - speed_ratio) / (free / free.max())
        return costs

    def _match_ratio(self, request: Request, stage: Stage, now: float) -> Costs:
        """Share of the prompt's blocks that each candidate is believed to hold, shape (candidates,)."""
        blocks = prompt_blocks(request, min_block_tokens=self._settings.block_tokens)
        matched = self._index.matched_blocks(blocks.hashes, stage.engine_ids, now=now)
        return matched / max(1, len(blocks.hashes))
