"""`--admission clairvoyant`: every length and arrival is known, and the dearest requests go so that others stay.

Two parts. A fluid model walks the trace once and plans: when a stage is predicted to miss a bound, the dearest request
behind the miss goes, be it one that came earlier (Moore and Hodgson's rule, optimal for one machine, here for a pool).
Then the simulator runs with the plan as its admission rule, for several notions of how full a stage may be planned;
the plan with which most requests are in time is the result. A search, not an optimum: a bound from below on what
knowledge can reach, as loadtest/fluid.py is one from above.

Source of the rule: J. M. Moore, An n job, one machine sequencing algorithm for minimizing the number of late jobs,
Management Science 15 (1968).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gateway.core.interfaces import Admission, Arrival, Gate, Patience, PrefillEnd, Refusal
from gateway.core.types import RejectReason, Slo
from loadtest.fluid import Demand, demand_of
from loadtest.sim_engines import Fleet
from loadtest.sim_plan import Plan, Run
from loadtest.sim_report import attained
from loadtest.simulator import simulate
from loadtest.workload import TraceRequest

NAME = "clairvoyant"
TICK_S = 0.25
"""Resolution of the planned decode load."""


@dataclass(frozen=True, slots=True)
class Fill:
    """How full the plan may make both stages, as shares of their bounds."""

    prefill: float = 1.0
    """Of the TTFT bound, for the wait and the prefill of a request."""
    decode: float = 1.0
    """Of the work per step that keeps the TBT bound."""


PREFILL_FILLS = (1.0, 0.9)
DECODE_FILLS = (1.0, 0.8, 0.9)
"""Tried one after another, the prefill's first. Measured on the conversation trace in settings A and B at 3x."""


@dataclass(frozen=True, slots=True)
class KeepOnly:
    """Refuses whoever is not in the plan; the others are for the inner rule."""

    kept: frozenset[str]
    inner: Admission

    def start(self) -> _KeepOnly:
        return _KeepOnly(self.kept, self.inner.start())


@dataclass(frozen=True, slots=True)
class _KeepOnly:
    kept: frozenset[str]
    inner: Gate

    def arrive(self, arrival: Arrival, *, now: float) -> NDArray[np.bool_] | Refusal | Patience | None:
        """A refusal unless the plan keeps the request."""
        if arrival.request.id not in self.kept:
            return Refusal(RejectReason.TTFT_SLO, "the plan leaves it out")
        return self.inner.arrive(arrival, now=now)

    def end_prefill(self, prefill: PrefillEnd, *, now: float) -> Refusal | Patience | None:
        """As the inner rule says."""
        return self.inner.end_prefill(prefill, now=now)


def search(plan: Plan, workload: Iterable[TraceRequest]) -> Run:
    """The run of the plan's admission rule behind the best choice of requests found; at most four runs."""
    requests = list(workload)
    demand = demand_of(requests, plan.fleet.profile)
    tried: dict[frozenset[str], tuple[int, Run]] = {}

    def run_of(fill: Fill) -> tuple[int, Run]:
        kept = kept_ids(demand, plan.fleet, plan.slo, fill)
        if kept not in tried:
            run = simulate(replace(plan, admission=KeepOnly(kept, plan.admission)), requests)
            tried[kept] = sum(attained(run, plan.slo)), run
        return tried[kept]

    prefill = max(PREFILL_FILLS, key=lambda share: run_of(Fill(share))[0])
    decode = max(DECODE_FILLS, key=lambda share: run_of(Fill(prefill, share))[0])
    return run_of(Fill(prefill, decode))[1]


def kept_ids(demand: Demand, fleet: Fleet, slo: Slo, fill: Fill) -> frozenset[str]:
    """The ids under which the simulator knows the requests that the plan keeps."""
    kept = np.ones(len(demand.arrival_s), dtype=bool)
    if slo.ttft_s is not None:
        kept = keep_prefills(demand, fleet.prefill + fleet.both, slo.ttft_s * fill.prefill, slo.ttft_s)
    if slo.tbt_s is not None:
        kept = keep_decodes(demand, fleet, slo.tbt_s, fill.decode, kept)
    return frozenset(f"r{number}" for number in np.flatnonzero(kept))


def keep_prefills(demand: Demand, engines: int, bound_s: float, alone_s: float) -> NDArray[np.bool_]:
    """Who is kept so that nobody's wait and prefill exceed `bound_s` (`alone_s` on an idle engine), shape (requests,).

    The pool is one queue that works off `engines` seconds per second.
    """
    kept = demand.prefill_s <= alone_s
    backlog_s = at = 0.0
    dearest: list[tuple[float, int]] = []
    for number in np.flatnonzero(kept):
        arrival_s, cost_s = float(demand.arrival_s[number]), float(demand.prefill_s[number])
        backlog_s, at = max(0.0, backlog_s - engines * (arrival_s - at)), arrival_s
        if backlog_s == 0.0:
            dearest.clear()
        heapq.heappush(dearest, (-cost_s, int(number)))
        backlog_s += cost_s
        # The request at the end of the queue: what is ahead of it, and itself on one engine.
        while dearest and (backlog_s - cost_s) / engines + cost_s > max(bound_s, cost_s):
            dropped_s, dropped = heapq.heappop(dearest)
            kept[dropped] = False
            backlog_s = max(0.0, backlog_s + dropped_s)
            if dropped == number:
                break
    return kept


def keep_decodes(demand: Demand, fleet: Fleet, tbt_s: float, fill: float, kept: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Of those kept, who stays so that no tick's decode work exceeds what steps of `tbt_s` hold, shape (requests,)."""
    engines, base_s = fleet.decode + fleet.both, fleet.profile.decode_base_s
    room_s = engines * max(0.0, tbt_s - base_s) * fill
    own_s = fleet.profile.decode_s_per_sequence + fleet.profile.decode_s_per_kv_token * demand.kv_tokens
    first = ((demand.arrival_s + demand.prefill_s) / TICK_S).astype(np.int64)
    last = first + np.ceil(demand.output_tokens * tbt_s * fill / TICK_S).astype(np.int64)
    load_s = np.zeros(int(last.max(initial=0)) + 1)
    kept = kept & (own_s <= room_s)
    running: list[tuple[int, int]] = []
    for number in sorted(np.flatnonzero(kept), key=lambda number: (first[number], number)):
        running = [(end, other) for end, other in running if end > first[number]]
        running.append((int(last[number]), int(number)))
        load_s[first[number] : last[number]] += own_s[number]
        while load_s[first[number] : last[number]].max(initial=0.0) > room_s:
            dropped = max((other for _, other in running), key=lambda other: (demand.decode_s[other], other))
            running = [(end, other) for end, other in running if other != dropped]
            load_s[first[dropped] : last[dropped]] -= own_s[dropped]
            kept[dropped] = False
            if dropped == number:
                break
    return kept
