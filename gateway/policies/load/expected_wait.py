"""Expected wait: the engine of each stage where SMG 1.13 expects the shortest wait (its `least_load`)."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np

from gateway.core.interfaces import PairTable
from gateway.core.types import Dispatch, Request
from gateway.policies.stage import Costs, Stage, prefill_then_decode
from gateway.policies.wait_score import WaitScore, WaitSettings


@dataclass(frozen=True, slots=True)
class ExpectedWait:
    """Lowest expected wait (wait_score.py), prefill before decode.

    SMG answers 503 when `max_waiting_requests` skips every engine. A policy cannot refuse: here none is skipped then.
    Source: SMG 1.13.0 `least_load`.
    """

    wait: WaitSettings = field(default_factory=WaitSettings)
    max_waiting_requests: int = 0
    """An engine with so many requests waiting is skipped; 0: none is."""

    def start(self, rng: random.Random) -> ExpectedWaitChooser:
        return ExpectedWaitChooser(self)


class ExpectedWaitChooser:
    """Remembers what was sent to each engine since its last report."""

    def __init__(self, settings: ExpectedWait) -> None:
        self._settings = settings
        self._score = WaitScore(settings.wait)

    def costs(self, request: Request, pairs: PairTable, *, now: float) -> Costs:
        """By expected wait, prefill before decode, shape (pairs,)."""

        def rule(stage: Stage) -> Costs:
            scores = self._score.score(stage.loads, now=now)
            is_full = self._is_full(stage, now)
            return scores if is_full.all() else np.where(is_full, np.inf, scores)

        return prefill_then_decode(pairs, rule, rule)

    def dispatched(self, request: Request, dispatch: Dispatch, *, now: float) -> None:
        estimate = dispatch.estimate
        self._score.sent(request, sorted({estimate.prefill, estimate.decode}))

    def _is_full(self, stage: Stage, now: float) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        cap = self._settings.max_waiting_requests
        return np.array([0 < cap <= self._score.waiting_count(load, now=now) for load in stage.loads], dtype=bool)
