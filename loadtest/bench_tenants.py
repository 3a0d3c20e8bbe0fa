"""`sluice bench tenants`: does a tenant keep its share beside one that floods, and a class its bound beside another?

Requests of one size arrive as a Poisson process, so what the engines can do is known: CAPACITY_PER_S. Each scenario is
simulated twice, once with the tenant that is looked at alone.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from gateway.admissions import ADMISSIONS, DEFAULT_ADMISSION
from gateway.core.admission import AdmissionLimits
from gateway.core.types import Slo
from gateway.core.waiting import STARVE_S
from gateway.plugins import plug_in
from gateway.policies.least_work import LeastWork
from loadtest.arguments import positive
from loadtest.report import is_attained
from loadtest.sim_engines import Fleet
from loadtest.sim_plan import Plan, Run
from loadtest.sim_report import outcome_of
from loadtest.simulator import simulate
from loadtest.workload import TraceRequest
from predictors import predictor
from predictors.profile import load_profile

PROFILE = "llama3-70b-8xa800-reference"
PREFILL_ENGINES, DECODE_ENGINES = 2, 4
PROMPT_TOKENS, OUTPUT_TOKENS = 8_000, 64
SLO = Slo(ttft_s=8.0, tbt_s=0.1)
LIMITS = AdmissionLimits(max_in_flight_per_engine=3)
"""Few at an engine, so that the rest waits where its order can be chosen."""
CAPACITY_PER_S = PREFILL_ENGINES / load_profile(PROFILE).whole_prefill_s(PROMPT_TOKENS, 0)
"""Requests a second that the prefill engines can compute; the decode engines could do more."""


@dataclass(frozen=True, slots=True)
class Stream:
    """What one tenant sends."""

    tenant: str
    rate_per_s: float
    weight: float = 1.0
    priority: int = 0


def workload(streams: Sequence[Stream], seconds: float, seed: int) -> Iterator[TraceRequest]:
    """The requests of all streams in order; a stream's own do not depend on the others."""
    arrivals: list[tuple[float, str]] = []
    for stream in streams:
        rng, at = random.Random(f"{stream.tenant} {seed}"), 0.0
        while (at := at + rng.expovariate(stream.rate_per_s)) < seconds:
            arrivals.append((at, stream.tenant))
    for at, tenant in sorted(arrivals):
        yield TraceRequest(at, PROMPT_TOKENS, OUTPUT_TOKENS, tenant=tenant)


def run(streams: Sequence[Stream], *, seconds: float, seed: int, admission: str) -> Run:
    """The streams together on the engines."""
    plan = Plan(
        fleet=Fleet(load_profile(PROFILE), prefill=PREFILL_ENGINES, decode=DECODE_ENGINES),
        policy=LeastWork(),
        predictor=predictor("analytic", profile=PROFILE),
        admission=plug_in("admission", ADMISSIONS, admission, {}),
        slo=SLO,
        seed=seed,
        limits=LIMITS,
        tenant_weights={stream.tenant: stream.weight for stream in streams},
        priorities={stream.tenant: stream.priority for stream in streams},
    )
    return simulate(plan, workload(streams, seconds, seed))


def attained(told: Run) -> Mapping[str, int]:
    """Requests within their bounds, by tenant."""
    counts: dict[str, int] = {}
    for flight in told.flights:
        counts.setdefault(flight.request.tenant, 0)
        counts[flight.request.tenant] += is_attained(outcome_of(flight), SLO)
    return counts


def longest_gap_s(told: Run, tenant: str) -> float:
    """The longest time between two of the tenant's first tokens, seconds; inf below two."""
    firsts = sorted(
        flight.first_token_at
        for flight in told.flights
        if flight.request.tenant == tenant and flight.first_token_at is not None
    )
    return max((later - earlier for earlier, later in pairwise(firsts)), default=float("inf"))


def flooded(*, seconds: float, seed: int, admission: str) -> dict[str, Any]:
    """One tenant at its share (half), beside one that sends ten times its own."""
    modest = Stream("modest", CAPACITY_PER_S / 2)
    flood = Stream("flood", CAPACITY_PER_S / 2 * 10)
    alone = attained(run([modest], seconds=seconds, seed=seed, admission=admission))["modest"]
    both = attained(run([modest, flood], seconds=seconds, seed=seed, admission=admission))
    return {
        "alone": alone,
        "beside_flood": both["modest"],
        "kept_ratio": both["modest"] / alone,
        "flood": both["flood"],
    }


def outranked(*, seconds: float, seed: int, admission: str) -> dict[str, Any]:
    """A high class that needs half of the engines, beside a low one that sends four times what they can do."""
    high = Stream("high", CAPACITY_PER_S / 2, priority=1)
    low = Stream("low", CAPACITY_PER_S * 4)
    alone = attained(run([high], seconds=seconds, seed=seed, admission=admission))["high"]
    both = run([high, low], seconds=seconds, seed=seed, admission=admission)
    counts = attained(both)
    return {
        "alone": alone,
        "beside_low": counts["high"],
        "kept_ratio": counts["high"] / alone,
        "low": counts["low"],
        "low_longest_gap_s": longest_gap_s(both, "low"),
        "starve_s": STARVE_S,
    }


def main(words: Sequence[str]) -> int:
    """Prints both scenarios; returns 0. Raises ConfigError."""
    parser = argparse.ArgumentParser(prog="sluice bench tenants", description=__doc__)
    parser.add_argument("--seconds", type=positive, default=600.0, help="of each run (default 600)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--admission", default=DEFAULT_ADMISSION, metavar="NAME", help="the rule beside the queue")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    flags = parser.parse_args(words)
    settings = {"seconds": flags.seconds, "seed": flags.seed, "admission": flags.admission}
    told = {"flooded": flooded(**settings), "outranked": outranked(**settings)}
    print(json.dumps(told) if flags.json else "\n".join(f"{name:<10} {figures}" for name, figures in told.items()))
    return 0
