"""Least predicted work: the pair on which the request is predicted to be complete first."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gateway.core.interfaces import PairTable
from gateway.core.types import Dispatch, Request


@dataclass(frozen=True, slots=True)
class LeastWork:
    """Cost of a pair: its predicted TTFT plus the time its decode would take."""

    output_tokens: int = 343
    """Expected output length where the request sets no lower limit. Source: mean of the Mooncake conversation trace."""

    def start(self, rng: random.Random) -> LeastWork:
        return self

    def costs(self, request: Request, pairs: PairTable, *, now: float) -> NDArray[np.float64]:
        """Predicted seconds to the last token, shape (pairs,)."""
        output_tokens = min(request.max_output_tokens or self.output_tokens, self.output_tokens)
        return pairs.ttft_s + output_tokens * pairs.tbt_s

    def dispatched(self, request: Request, dispatch: Dispatch, *, now: float) -> None:
        """Nothing to remember: the ledger holds what was sent."""
