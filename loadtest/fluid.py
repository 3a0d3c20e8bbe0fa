"""What no policy can pass: requests as amounts of work, engines as capacity, no queue and no cache in anybody's way.

Every request is given the best prefix that any earlier request left anywhere, every engine works without a pause, and
a request counts as soon as its work fits somewhere between the first arrival and the last deadline. The cheapest
requests then fill both stages, which is a linear programme of two rows: maximise sum(x), 0 <= x <= 1, subject to
prefill . x <= its capacity and decode . x <= its capacity. Its dual bounds it from above at every price, so the least
over a row of prices is a bound whatever the prices are.

A decode engine whose steps last `tbt` seconds spends `base` of each on weights and the rest on its sequences. Longer
steps do more work per second, and a request within its bound has steps of `tbt` in the mean at most, so an engine does
at most (tbt - base) / tbt seconds of sequence work per second.

The reference simulation behind SETTING_A's figures counts also what cannot be served by an idle engine; here a prompt
that alone takes longer than the TTFT bound is counted as missed, which is why this bound lies below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gateway.core.types import Slo
from loadtest.sim_engines import Fleet
from loadtest.workload import BLOCK_TOKENS, TraceRequest
from predictors.profile import Profile

Row = NDArray[np.float64]
PRICES = np.logspace(-3.0, 3.0, 121)
"""Of a unit of decode capacity, in units of prefill capacity."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What a workload asks of the engines; arrays of shape (requests,)."""

    arrival_s: Row
    prefill_s: Row
    """Seconds of one prefill engine with the best prefix that an earlier request could have left."""
    decode_s: Row
    """Seconds of one decode engine's steps that are the request's own: its sequence and its KV, all tokens together."""
    output_tokens: Row
    kv_tokens: Row
    """Held while it decodes, in the mean."""


def demand_of(requests: Sequence[TraceRequest], profile: Profile) -> Demand:
    """The work behind the requests."""
    outputs = np.array([request.output_tokens for request in requests], dtype=float)
    kv_tokens = np.array([request.prompt_tokens for request in requests], dtype=float) + outputs / 2
    own_s = profile.decode_s_per_sequence + profile.decode_s_per_kv_token * kv_tokens
    return Demand(
        arrival_s=np.array([request.arrival_s for request in requests], dtype=float),
        prefill_s=np.array(
            [
                _least_prefill_s(profile, request.prompt_tokens, cached)
                for request, cached in zip(requests, best_cached_tokens(requests), strict=True)
            ],
            dtype=float,
        ),
        # The first token comes with the prefill's end: one gap less than tokens.
        decode_s=np.maximum(0.0, outputs - 1) * own_s,
        output_tokens=outputs,
        kv_tokens=kv_tokens,
    )


def best_cached_tokens(requests: Sequence[TraceRequest]) -> list[int]:
    """For each request the tokens of its longest prefix that came before, at most all but one."""
    seen: set[int] = set()
    cached = []
    for request in requests:
        blocks = 0
        for block_id in request.block_ids or ():
            if block_id not in seen:
                break
            blocks += 1
        seen.update(request.block_ids or ())
        cached.append(min(blocks * BLOCK_TOKENS, request.prompt_tokens - 1))
    return cached


def _least_prefill_s(profile: Profile, prompt_tokens: int, cached_tokens: int) -> float:
    """Seconds of the prefill; where a step has a budget, several prompts may share what a step costs."""
    whole_s = profile.whole_prefill_s(prompt_tokens, cached_tokens)
    if profile.chunk_tokens is None:
        return whole_s
    new_tokens = prompt_tokens - cached_tokens
    work_s = profile.prefill_s_per_token * new_tokens
    work_s += profile.prefill_s_per_square_token * (prompt_tokens**2 - cached_tokens**2)
    return min(whole_s, work_s + profile.prefill_base_s * new_tokens / profile.chunk_tokens)


def attainable_ratio(requests: Sequence[TraceRequest], fleet: Fleet, slo: Slo) -> float:
    """The share of the requests that is within the bounds at best, 0 <= ratio <= 1; 1.0 for no requests.

    Engines of role both count for both stages. Noise on prefill times is not counted.
    """
    if not requests:
        return 1.0
    demand = demand_of(requests, fleet.profile)
    span_s = float(demand.arrival_s[-1] - demand.arrival_s[0])
    possible = np.ones(len(requests), dtype=bool)
    rows: list[tuple[Row, float]] = []
    if slo.ttft_s is not None:
        possible &= demand.prefill_s <= slo.ttft_s
        rows.append((demand.prefill_s, (fleet.prefill + fleet.both) * (span_s + slo.ttft_s)))
    if slo.tbt_s is not None:
        one_s = fleet.profile.decode_base_s + demand.decode_s / np.maximum(1.0, demand.output_tokens - 1)
        possible &= (one_s <= slo.tbt_s) | (demand.output_tokens <= 1)
        if slo.ttft_s is not None:
            last_s = slo.ttft_s + slo.tbt_s * float(demand.output_tokens.max())
            rate = max(0.0, slo.tbt_s - fleet.profile.decode_base_s) / slo.tbt_s
            rows.append((demand.decode_s, (fleet.decode + fleet.both) * rate * (span_s + last_s)))
    kept = [(costs[possible], capacity) for costs, capacity in rows]
    return most(int(possible.sum()), kept) / len(requests)


def most(count: int, rows: Sequence[tuple[Row, float]]) -> float:
    """A bound on sum(x) for 0 <= x <= 1 under at most two rows (costs >= 0 of shape (count,), capacity >= 0)."""
    shares = [costs / capacity if capacity > 0 else np.where(costs > 0, np.inf, 0.0) for costs, capacity in rows]
    bounds = [float(count), *(_cheapest(share, 1.0) for share in shares)]
    if len(shares) == 2:
        # Both rows, the second at a price: whatever keeps both keeps their weighted sum.
        bounds += [_cheapest(shares[0] + price * shares[1], 1.0 + price) for price in PRICES]
    return min(bounds)


def _cheapest(costs: Row, capacity: float) -> float:
    """How many of the cheapest fit, the last one in part."""
    sums = np.cumsum(np.sort(costs))
    whole = int(np.searchsorted(sums, capacity, side="right"))
    if whole == len(sums):
        return float(whole)
    before = float(sums[whole - 1]) if whole else 0.0
    part = (capacity - before) / float(sums[whole] - before)
    return whole + min(1.0, max(0.0, part))
