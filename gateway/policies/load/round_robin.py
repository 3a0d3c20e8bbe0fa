"""Round robin: the engines of each stage in turn."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from gateway.core.interfaces import PairTable
from gateway.core.types import Dispatch, Request
from gateway.policies.stage import Costs, Stage, prefill_then_decode


@dataclass(frozen=True, slots=True)
class RoundRobin:
    """The N-th request goes to number N mod n of the candidates, independently for prefill and decode.

    Source: production-stack `roundrobin` (`sorted(urls)[n mod N]`) and its orchestrated disaggregated prefill.
    """

    def start(self, rng: random.Random) -> RoundRobinChooser:
        return RoundRobinChooser()


class RoundRobinChooser:
    """Counts the requests it sent."""

    def __init__(self) -> None:
        self._sent_count = 0

    def costs(self, request: Request, pairs: PairTable, *, now: float) -> Costs:
        """How many turns each engine is away from its own, shape (pairs,)."""
        return prefill_then_decode(pairs, self._turns_away, self._turns_away)

    def dispatched(self, request: Request, dispatch: Dispatch, *, now: float) -> None:
        self._sent_count += 1

    def _turns_away(self, stage: Stage) -> Costs:
        return ((np.arange(len(stage)) - self._sent_count) % len(stage)).astype(float)
