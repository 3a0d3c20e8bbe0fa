"""Mooncake, local cache-aware: the prefill engine with the lowest predicted TTFT, each with the prefix it holds."""

from __future__ import annotations

import random
from dataclasses import dataclass

from gateway.core.interfaces import PairTable
from gateway.core.types import Dispatch, Request
from gateway.policies.stage import Costs, predicted_tbt, prefill_then_decode


@dataclass(frozen=True, slots=True)
class MooncakeLocal:
    """Lowest queue + prefill time, then the decode engine with the lowest predicted TBT.

    Source: FAST'25 section 4 ("cache-aware prefill scheduling"); "local cache aware" of figure 5.
    """

    def start(self, rng: random.Random) -> MooncakeLocal:
        return self

    def costs(self, request: Request, pairs: PairTable, *, now: float) -> Costs:
        """By predicted TTFT of the prefill, then predicted TBT; shape (pairs,)."""
        return prefill_then_decode(pairs, lambda stage: stage.compute_s, predicted_tbt)

    def dispatched(self, request: Request, dispatch: Dispatch, *, now: float) -> None:
        """Nothing to remember."""
