"""What a policy was shown of one request and what it thought of it: something put around a policy that looks on."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gateway.core.estimate import estimate_at
from gateway.core.interfaces import Chooser, PairTable, Policy
from gateway.core.types import Dispatch, Request

_STAGES = ("wait_s", "fetch_s", "prefill_s", "hand_off_s", "join_s")


@dataclass(frozen=True, slots=True)
class Look:
    """Every pair that was feasible at an instant, and the policy's cost of each."""

    at: float
    pairs: PairTable
    costs: NDArray[np.float64]
    """Shape (pairs,)."""

    def rows(self) -> list[dict[str, object]]:
        """One row per pair, the cheapest first; seconds and tokens."""
        found: list[dict[str, object]] = []
        for rank, row in enumerate(np.argsort(self.costs, kind="stable"), 1):
            estimate = estimate_at(self.pairs, int(row))
            cost = float(self.costs[row])
            found.append(
                {"rank": rank, "prefill": estimate.prefill, "decode": estimate.decode}
                | {"fetch_from": estimate.fetch_from, "cached_tokens": estimate.cached_tokens}
                | {stage: getattr(estimate, stage) for stage in _STAGES}
                | {"ttft_s": estimate.ttft_s, "tbt_s": estimate.tbt_s, "cost": cost if np.isfinite(cost) else None}
            )
        return found

    def table(self) -> list[str]:
        """The same for people, times in milliseconds."""
        times = (*_STAGES, "ttft_s", "tbt_s")
        head = f"{'rank':>4}  {'prefill':<20} {'decode':<20} {'fetch from':<20} {'cached':>8}"
        lines = [head + "".join(f" {name.removesuffix('_s'):>9}" for name in times) + f" {'cost':>10}"]
        for row in self.rows():
            cells = "".join(f" {float(str(row[name])) * 1e3:>9.1f}" for name in times)
            engines = f"{row['prefill']:<20} {row['decode']:<20} {row['fetch_from'] or '-':<20}"
            cost = "-" if row["cost"] is None else f"{row['cost']:.4g}"
            lines.append(f"{row['rank']:>4}  {engines} {row['cached_tokens']:>8}{cells} {cost:>10}")
        return lines


@dataclass(slots=True)
class Looks:
    """The last look that was taken for one request."""

    request_id: str
    last: Look | None = field(default=None)

    def around(self, policy: Policy) -> Policy:
        """The same policy, watched."""
        return _WatchedPolicy(policy, self)


@dataclass(frozen=True, slots=True)
class _WatchedPolicy:
    policy: Policy
    looks: Looks

    def start(self, rng: random.Random) -> Chooser:
        return _WatchedChooser(self.policy.start(rng), self.looks)


@dataclass(frozen=True, slots=True)
class _WatchedChooser:
    chooser: Chooser
    looks: Looks

    def costs(self, request: Request, pairs: PairTable, *, now: float) -> NDArray[np.float64]:
        costs = self.chooser.costs(request, pairs, now=now)
        if request.id == self.looks.request_id:
            self.looks.last = Look(now, pairs, np.array(costs))
        return costs

    def dispatched(self, request: Request, dispatch: Dispatch, *, now: float) -> None:
        self.chooser.dispatched(request, dispatch, now=now)
