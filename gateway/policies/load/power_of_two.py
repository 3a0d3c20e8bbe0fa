"""Power of two choices: of two engines drawn at random the less loaded one, in each stage."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from gateway.core.interfaces import EngineLoad, PairTable
from gateway.core.types import Dispatch, Request
from gateway.policies.stage import Costs, Stage, prefill_then_decode
from gateway.policies.wait_score import WaitScore, WaitSettings


class Mode(StrEnum):
    """What makes one of the two less loaded."""

    CLASSIC = "classic"
    """Lower KV usage if both report it, else fewer requests of ours. Source: sgl-router before SMG 1.13."""
    EXPECTED_WAIT = "expected_wait"
    """Lower expected wait. Source: SMG 1.13.0, its default mode."""


@dataclass(frozen=True, slots=True)
class PowerOfTwo:
    """Two distinct engines at random, the less loaded of them; a tie goes to the one drawn first."""

    mode: Mode = Mode.CLASSIC
    wait: WaitSettings = field(default_factory=WaitSettings)

    def start(self, rng: random.Random) -> PowerOfTwoChooser:
        return PowerOfTwoChooser(self, rng)


class PowerOfTwoChooser:
    """Draws anew for every decision; remembers what was sent to each engine since its last report."""

    def __init__(self, settings: PowerOfTwo, rng: random.Random) -> None:
        self._mode = settings.mode
        self._rng = rng
        self._score = WaitScore(settings.wait)

    def costs(self, request: Request, pairs: PairTable, *, now: float) -> Costs:
        """The winner of the draw before the loser, before all that were not drawn; shape (pairs,)."""

        def rule(stage: Stage) -> Costs:
            costs = np.full(len(stage), 2.0)
            drawn = self._rng.sample(range(len(stage)), min(2, len(stage)))
            loads = self._loads([stage.loads[index] for index in drawn], now)
            for rank, position in enumerate(np.argsort(loads, kind="stable")):
                costs[drawn[position]] = rank
            return costs

        return prefill_then_decode(pairs, rule, rule)

    def dispatched(self, request: Request, dispatch: Dispatch, *, now: float) -> None:
        estimate = dispatch.estimate
        self._score.sent(request, sorted({estimate.prefill, estimate.decode}))

    def _loads(self, drawn: Sequence[EngineLoad], now: float) -> Costs:
        """What is compared, shape (drawn,)."""
        if self._mode is Mode.EXPECTED_WAIT:
            return self._score.score(drawn, now=now)
        usages = [load.report.kv_usage_ratio for load in drawn if load.report is not None]
        reported = [usage for usage in usages if usage is not None]
        values = reported if len(reported) == len(drawn) else [float(load.own_count) for load in drawn]
        return np.array(values)
