"""xLLM's SLO-aware routing: the shortest prefill queue, and the first decode engine inside the TPOT bound."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from gateway.core.interfaces import PairTable
from gateway.core.types import Dispatch, Request
from gateway.policies.stage import Costs, Stage, predicted_tbt, prefill_then_decode


@dataclass(frozen=True, slots=True)
class XllmSloAware:
    """Prefill: least predicted seconds queued. Decode: the first with TPOT <= 50 ms, else the lowest TPOT.

    xLLM predicts with polynomials of its own; here the gateway's predictor does. What it does besides, a gateway
    cannot: run a prefill on a decode engine when prefill queues pass 1 s, and turn prefill engines into decode engines.
    Source: baseline-policies section 5.5 (instance_mgr.cpp:905-1020).
    """

    target_tpot_s: float = 0.050

    def start(self, rng: random.Random) -> XllmSloAware:
        return self

    def costs(self, request: Request, pairs: PairTable, *, now: float) -> Costs:
        """By queue for prefill, then by TPOT for decode; shape (pairs,)."""

        def decode_rule(stage: Stage) -> Costs:
            tpot_s = predicted_tbt(stage)
            return np.where(tpot_s <= self.target_tpot_s, 0.0, tpot_s)

        return prefill_then_decode(pairs, lambda stage: pairs.wait_s[stage.rows], decode_rule)

    def dispatched(self, request: Request, dispatch: Dispatch, *, now: float) -> None:
        """Nothing to remember: the ledger sums the queues."""
