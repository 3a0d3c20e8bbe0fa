"""Random: any prefill engine, then any decode engine that goes with it."""

from __future__ import annotations

import random
from dataclasses import dataclass

from gateway.core.interfaces import PairTable
from gateway.core.types import Dispatch, Request
from gateway.policies.lottery import draw_order
from gateway.policies.stage import Costs, Stage, prefill_then_decode


@dataclass(frozen=True, slots=True)
class Random:
    """Uniform over the prefill engines, then over the decode engines. Source: sgl-router `random`."""

    def start(self, rng: random.Random) -> RandomChooser:
        return RandomChooser(rng)


@dataclass(frozen=True, slots=True)
class RandomChooser:
    """Draws anew for every decision."""

    rng: random.Random

    def costs(self, request: Request, pairs: PairTable, *, now: float) -> Costs:
        """A random order, shape (pairs,)."""
        return prefill_then_decode(pairs, self._draw, self._draw)

    def dispatched(self, request: Request, dispatch: Dispatch, *, now: float) -> None:
        """Nothing to remember."""

    def _draw(self, stage: Stage) -> Costs:
        return draw_order(self.rng, len(stage))
