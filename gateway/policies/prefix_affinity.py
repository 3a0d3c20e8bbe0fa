"""Prefix affinity: the longest match wins, unless waiting for it takes too long."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from gateway.core.interfaces import PairTable
from gateway.core.types import Dispatch, Request
from gateway.policies.settings import require
from gateway.policies.stage import Costs, lexicographic


@dataclass(frozen=True, slots=True)
class PrefixAffinity:
    """The pair whose prefill engine holds most of the prompt, of all with a predicted TTFT near the best one.

    Affinity keeps an engine's cache for the prompts that come back to it, which the TTFT of one request does not see;
    the factor is what one request pays for that at most.
    """

    max_ttft_ratio: float = 1.5
    """Pairs with a predicted TTFT above this multiple of the best pair's come last."""

    def __post_init__(self) -> None:
        require(self.max_ttft_ratio >= 1, "max_ttft_ratio >= 1")

    def start(self, rng: random.Random) -> PrefixAffinity:
        return self

    def costs(self, request: Request, pairs: PairTable, *, now: float) -> Costs:
        """Ranks by tokens held, ties by predicted TTFT plus one TBT; the slow ones after all others; shape (pairs,)."""
        ttft_s = pairs.ttft_s
        is_slow = ttft_s > self.max_ttft_ratio * ttft_s.min()
        return lexicographic(is_slow, np.where(is_slow, 0, -pairs.held_tokens), ttft_s + pairs.tbt_s)

    def dispatched(self, request: Request, dispatch: Dispatch, *, now: float) -> None:
        """Nothing to remember: the index holds what is cached."""
