"""SGLang's cache-aware routing, classic: to the engine of the longest match unless the loads are out of balance."""

from __future__ import annotations

import random
from dataclasses import dataclass

from gateway.core.interfaces import PairTable
from gateway.core.types import Dispatch, Request
from gateway.policies.approximate_index import ApproximateIndex
from gateway.policies.prompt_blocks import prompt_blocks
from gateway.policies.stage import Costs, Stage, fewest_in_flight, lexicographic, prefill_then_decode


@dataclass(frozen=True, slots=True)
class SglangCacheAware:
    """Longest match where enough matches, else fewest in flight; fewest in flight too when the loads are imbalanced.

    The router keeps a tree of prompts it sent (of characters over HTTP, of tokens over gRPC; here of blocks) and looks
    at nothing but its own counts. Engines with equal matches: the tree names the last one to touch the node, here the
    one with the fewest requests. Source: baseline-policies section 5.3; defaults of the command line of sglang_router
    0.3.2 and smg 1.13.0.
    """

    cache_threshold_ratio: float = 0.3
    """Share of the prompt that must match for the match to count."""
    balance_abs_count: int = 64
    balance_rel_ratio: float = 1.5
    """Imbalanced: the spread of in-flight counts is over the one, and the highest over this multiple of the lowest."""
    max_tree_tokens: int = 2**26
    """Of each engine's prompts; the least recently sent go first (there once a minute, here at once)."""
    is_decode_cache_aware: bool = True
    """The router's `--decode-policy` is its `--policy` unless set. False: fewest in flight."""

    def start(self, rng: random.Random) -> SglangCacheAwareChooser:
        return SglangCacheAwareChooser(self)


class SglangCacheAwareChooser:
    """Remembers the prompts it sent to each engine."""

    def __init__(self, settings: SglangCacheAware) -> None:
        self._settings = settings
        self._index = ApproximateIndex()

    def costs(self, request: Request, pairs: PairTable, *, now: float) -> Costs:
        """By match or by requests in flight, prefill before decode, shape (pairs,)."""
        settings, blocks = self._settings, prompt_blocks(request)

        def rule(stage: Stage) -> Costs:
            counts = stage.own_counts
            spread, highest, lowest = counts.max() - counts.min(), counts.max(), counts.min()
            if spread > settings.balance_abs_count and highest > settings.balance_rel_ratio * lowest:
                return counts
            matched = self._index.matched_blocks(blocks.hashes, stage.engine_ids, now=now)
            if matched.max() * blocks.block_tokens > settings.cache_threshold_ratio * request.prompt_tokens:
                return lexicographic(-matched, counts)
            return counts

        return prefill_then_decode(pairs, rule, rule if settings.is_decode_cache_aware else fewest_in_flight)

    def dispatched(self, request: Request, dispatch: Dispatch, *, now: float) -> None:
        """The prompt joins the trees of both engines."""
        blocks, estimate = prompt_blocks(request), dispatch.estimate
        max_blocks = self._settings.max_tree_tokens // blocks.block_tokens
        for engine_id in sorted({estimate.prefill, estimate.decode}):
            self._index.insert(engine_id, blocks.hashes, max_blocks=max_blocks, now=now)
