"""Mooncake's Algorithm 1, global cache-aware: as local, but a prefix much longer than the own one is fetched."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from gateway.core.interfaces import PairTable
from gateway.core.types import Dispatch, Request
from gateway.policies.stage import Costs, lexicographic


@dataclass(frozen=True, slots=True)
class MooncakeGlobal:
    """Lowest transfer + queue + prefill time, then the lowest predicted TBT.

    An engine fetches when best prefix / own prefix >= `balancing_threshold` (an own prefix of 0: always), and computes
    with what it holds otherwise. Which of the two is faster is not asked. Where engines cannot fetch, this is the
    local rule. The refusal at the end of Algorithm 1 is admission's. Source: arXiv:2407.00079 v3, Algorithm 1.
    """

    balancing_threshold: float = 1.0
    """kvcache_balancing_threshold. Not published; 1: any longer prefix is fetched."""

    def start(self, rng: random.Random) -> MooncakeGlobal:
        return self

    def costs(self, request: Request, pairs: PairTable, *, now: float) -> Costs:
        """By predicted TTFT of the prefill, then predicted TBT; +inf for the row not chosen; shape (pairs,)."""
        is_fetch = pairs.fetch_row >= 0
        fetches = is_fetch & (pairs.cached_tokens >= self.balancing_threshold * pairs.held_tokens)
        must_fetch = np.zeros(len(pairs.prefills), dtype=bool)
        must_fetch[pairs.prefill_row[fetches]] = True
        is_candidate = np.where(is_fetch, fetches, ~must_fetch[pairs.prefill_row])
        ranks = lexicographic(pairs.fetch_s + pairs.wait_s + pairs.prefill_s, pairs.tbt_s)
        return np.where(is_candidate, ranks, np.inf)

    def dispatched(self, request: Request, dispatch: Dispatch, *, now: float) -> None:
        """Nothing to remember."""
