"""The best pairs of one decision, small enough to be kept: what explains a choice after the table of pairs is gone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gateway.core.interfaces import PairTable


@dataclass(frozen=True, slots=True)
class Candidates:
    """Columns, one row per pair, the policy's favourite first; ties stand in the order of the table."""

    pair_count: int
    """Pairs that were considered; the columns hold the best of them."""
    prefill: tuple[str, ...]
    decode: tuple[str, ...]
    cost: tuple[float, ...]
    """What the policy thought of the pair: lowest wins; +inf: not allowed."""
    ttft_s: tuple[float, ...]
    tbt_s: tuple[float, ...]
    wait_s: tuple[float, ...]
    """Of `ttft_s`, the wait for prefills that are ahead."""
    cached_tokens: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prefill)


def best_of(pairs: PairTable, costs: NDArray[np.float64], *, keep: int) -> Candidates:
    """The `keep` >= 1 pairs of lowest cost. `costs` has shape (pairs,)."""
    rows = np.argsort(costs, kind="stable")[:keep]
    return Candidates(
        pair_count=len(pairs),
        prefill=tuple([pairs.prefills[row].engine.id for row in pairs.prefill_row[rows].tolist()]),
        decode=tuple([pairs.decodes[row].engine.id for row in pairs.decode_row[rows].tolist()]),
        cost=tuple(costs[rows].tolist()),
        ttft_s=tuple(pairs.ttft_s[rows].tolist()),
        tbt_s=tuple(pairs.tbt_s[rows].tolist()),
        wait_s=tuple(pairs.wait_s[rows].tolist()),
        cached_tokens=tuple(pairs.cached_tokens[rows].tolist()),
    )
