"""Least loaded: the engine of each stage with the fewest requests of ours."""

from __future__ import annotations

import random
from dataclasses import dataclass

from gateway.core.interfaces import PairTable
from gateway.core.types import Dispatch, Request
from gateway.policies.stage import Costs, fewest_in_flight, prefill_then_decode


@dataclass(frozen=True, slots=True)
class LeastLoaded:
    """Fewest requests that this gateway has in flight there; ties go to the first engine.

    Source: "load balancing" of the Mooncake paper's figure 5, and what sgl-router's policies fall back to.
    """

    def start(self, rng: random.Random) -> LeastLoaded:
        return self

    def costs(self, request: Request, pairs: PairTable, *, now: float) -> Costs:
        """By requests in flight, prefill before decode, shape (pairs,)."""
        return prefill_then_decode(pairs, fewest_in_flight, fewest_in_flight)

    def dispatched(self, request: Request, dispatch: Dispatch, *, now: float) -> None:
        """Nothing to remember: the ledger counts."""
