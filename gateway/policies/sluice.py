"""Ours: the first token soonest, and of equal pairs the one whose prefill engine has the least to compute."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gateway.core.interfaces import PairTable
from gateway.core.types import Dispatch, Request


@dataclass(frozen=True, slots=True)
class Sluice:
    """Cost of a pair: its predicted TTFT, its decode step, and what it takes of the prefill engines."""

    work_weight: float = 0.1
    """What a second of prefill counts beside a second until the first token: a prefix is used where it lies unless the
    wait for it is ten times the saving."""
    step_weight: float = 1.0
    """What a second of the decode step counts, the prefill that is mixed into it included."""
    can_skip_hand_off: bool = True
    """Whether a decode engine may compute the prompt itself where that is predicted to be better and no bound of
    anybody there is broken by it. Only vLLM's decode engines can."""

    def __post_init__(self) -> None:
        if not (0.0 <= self.work_weight < float("inf") and 0.0 <= self.step_weight < float("inf")):
            raise ValueError("work_weight and step_weight must be 0 or more, and finite")

    def start(self, rng: random.Random) -> Sluice:
        return self

    def costs(self, request: Request, pairs: PairTable, *, now: float) -> NDArray[np.float64]:
        """Predicted seconds, shape (pairs,)."""
        step_s = pairs.tbt_s + pairs.stall_s
        return pairs.ttft_s + self.work_weight * pairs.prefill_s + self.step_weight * step_s

    def dispatched(self, request: Request, dispatch: Dispatch, *, now: float) -> None:
        """Nothing to remember: the ledger holds what was sent."""
