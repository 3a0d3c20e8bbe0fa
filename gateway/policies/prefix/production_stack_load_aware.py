"""production-stack's load-aware routing: the matched share of the prompt minus the load above the mean."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from gateway.core.interfaces import PairTable
from gateway.core.types import Dispatch, Request
from gateway.policies.stage import Costs, Stage, fewest_in_flight, prefill_then_decode


@dataclass(frozen=True, slots=True)
class ProductionStackLoadAware:
    """Highest matched_i / length - beta (load_i - mean load) / max(1, mean load).

    What matches, the router asks LMCache; here the index of KV events answers. It has no such rule for decode engines:
    fewest in flight. Source: baseline-policies section 5.4 (`loadaware`, production-stack #1035).
    """

    load_weight: float = 1.0
    """beta"""

    def start(self, rng: random.Random) -> ProductionStackLoadAware:
        return self

    def costs(self, request: Request, pairs: PairTable, *, now: float) -> Costs:
        """By the negated score for prefill, then by requests in flight for decode, shape (pairs,)."""
        return prefill_then_decode(pairs, lambda stage: -self.scores(request, stage), fewest_in_flight)

    def dispatched(self, request: Request, dispatch: Dispatch, *, now: float) -> None:
        """Nothing to remember."""

    def scores(self, request: Request, stage: Stage) -> Costs:
        """Score of each candidate, <= 1 at mean load, shape (candidates,)."""
        counts = stage.own_counts
        mean = float(np.mean(counts))
        return stage.held_tokens / request.prompt_tokens - self.load_weight * (counts - mean) / max(1.0, mean)
