"""Second rows for pairs whose prefill engine could first fetch a longer prefix from another engine.

To compute what another engine holds already, or to pull it: that is a choice like the choice of the engine. So it
stands in the table as rows of its own, and a policy decides it by the row it prefers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from gateway.core.interfaces import EngineLoad, Estimator, PairTable
from gateway.core.types import Request, Role


def best_holders(prefills: Sequence[EngineLoad], cached: NDArray[np.int64]) -> NDArray[np.intp]:
    """For each prefill engine the one of its pool that holds most of the prompt, -1 where none holds more than it does.

    Indices into `prefills`, shape (prefills,), as is `cached`. Only engines that can share prefixes give or take.
    """
    sharing = [
        row
        for row, load in enumerate(prefills)
        if load.engine.can_share_prefixes and load.engine.role is not Role.DECODE
    ]
    best: dict[str, int] = {}
    for row in sharing:
        pool = prefills[row].engine.pool
        if cached[row] > cached[best.setdefault(pool, row)]:
            best[pool] = row
    holders = np.full(len(prefills), -1, dtype=np.intp)
    for row in sharing:
        holder = best[prefills[row].engine.pool]
        if cached[holder] > cached[row]:
            holders[row] = holder
    return holders


def with_fetches(request: Request, pairs: PairTable, estimator: Estimator, cached: NDArray[np.int64]) -> PairTable:
    """The table followed by a second row for each pair that can fetch.

    `cached` has shape (prefills,): the prompt tokens each prefill engine holds itself.
    """
    holders = best_holders(pairs.prefills, cached)
    twins = np.flatnonzero(holders[pairs.prefill_row] >= 0)
    if len(twins) == 0:
        return pairs
    fetch_s, prefill_s = np.zeros(len(holders)), np.zeros(len(holders))
    for row in np.flatnonzero(holders >= 0):
        engine, holder = pairs.prefills[row].engine, pairs.prefills[holders[row]].engine
        held_tokens = int(cached[holders[row]])
        missing_tokens = held_tokens - int(cached[row])
        fetch_s[row] = estimator.hand_off_s([holder], [engine], prompt_tokens=missing_tokens)[0, 0]
        prefill_s[row] = estimator.prefill_s(engine, prompt_tokens=request.prompt_tokens, cached_tokens=held_tokens)
    source = np.concatenate([np.arange(len(pairs)), twins])
    is_fetch = np.arange(len(source)) >= len(pairs)
    prefill_row = pairs.prefill_row[source]
    holder_row = np.where(is_fetch, holders[prefill_row], -1)
    fetched_tokens = np.where(is_fetch, cached[holder_row] - cached[prefill_row], 0)
    return replace(
        pairs,
        prefill_row=prefill_row,
        decode_row=pairs.decode_row[source],
        fetch_row=holder_row,
        cached_tokens=cached[prefill_row] + fetched_tokens,
        fetched_tokens=fetched_tokens,
        wait_s=pairs.wait_s[source],
        fetch_s=np.where(is_fetch, fetch_s[prefill_row], 0.0),
        prefill_s=np.where(is_fetch, prefill_s[prefill_row], pairs.prefill_s[source]),
        hand_off_s=pairs.hand_off_s[source],
        join_s=pairs.join_s[source],
        tbt_s=pairs.tbt_s[source],
        has_room=pairs.has_room[source],
        is_local=pairs.is_local[source],
        stall_s=pairs.stall_s[source],
    )
