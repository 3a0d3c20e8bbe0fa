"""`sluice bench returns`: what comes of clients that come back when they are told to, of a crowd, of one who hammers.

Each row is a simulation of the workload that the flags name. In all of them who is refused comes back as told; in some
a crowd comes at one instant, on top of the workload, and in some one client asks again each 100 ms whatever it is told:
one with a prompt of the workload's median length, and one with its longest, which may be more than any engine can do in
time. `rest` is the workload without crowd and hammerer.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from loadtest.exhibit import columns
from loadtest.flight import Flight
from loadtest.report import Status, is_attained
from loadtest.sim_options import Spec, add_options, plan_of, spec_of, workload_of
from loadtest.sim_plan import Plan, Run
from loadtest.sim_report import outcome_of
from loadtest.sim_returns import Manner, Returning, return_figures
from loadtest.simulator import simulate
from loadtest.workload import TraceRequest

CROWD = "crowd"
"""The session of the requests of the crowd, by which they are known among the others."""
WINDOW_S = 30.0
"""Over which the share that is refused is looked at."""


@dataclass(frozen=True, slots=True)
class Case:
    """One simulation."""

    name: str
    crowd: Manner | None = None
    """How a crowd comes back; None: there is none."""
    hammers: str | None = None
    """Whose length of prompt the client that hammers has: `median` or `longest`."""


CASES = (
    Case("they come back as told"),
    Case("a crowd that obeys", crowd=Manner.OBEY),
    Case("a crowd that hammers", crowd=Manner.HAMMER),
    Case("one hammers, median prompt", hammers="median"),
    Case("one hammers, longest prompt", hammers="longest"),
)


def with_crowd(requests: Sequence[TraceRequest], count: int, at_s: float, *, seed: int) -> list[TraceRequest]:
    """The workload, and `count` of its requests once more at that instant, with prompts that share nothing."""
    drawn = random.Random(f"crowd {seed}").choices(requests, k=count)
    crowd = [replace(request, arrival_s=at_s, block_ids=None, session=CROWD) for request in drawn]
    return sorted([*requests, *crowd], key=lambda request: request.arrival_s)


def hammerer(requests: Sequence[TraceRequest], kind: str) -> TraceRequest:
    """The request of that length, as another client would ask it."""
    ranked = sorted(requests, key=lambda request: request.prompt_tokens)
    return replace(ranked[-1 if kind == "longest" else len(ranked) // 2], block_ids=None)


def run_case(spec: Spec, case: Case, *, crowd: int, at_s: float) -> Run:
    """The run in which that happens."""
    source, block_tokens = workload_of(spec)
    requests = list(source)
    plan: Plan = replace(plan_of(spec, block_tokens), returning=Returning(case.crowd or Manner.OBEY, spec.max_visits))
    if case.hammers is not None:
        plan = replace(plan, hammerers=(hammerer(requests, case.hammers),))
    if case.crowd is not None:
        requests = with_crowd(requests, crowd, at_s, seed=spec.seed)
    return simulate(plan, requests)


def found(run: Run, at_s: float) -> dict[str, Any]:
    """What the run came to.

    The goodput is of answers that ended before the last client of the workload first came. `drained_s` is from the
    crowd's instant to the last of its answers. `second_peak` is how much larger the share of refused requests was in
    any stretch of `WINDOW_S` s than in the one before, after the crowd's first one.
    """
    slo = run.plan.slo
    rest = [flight for flight in run.flights if flight.trace.session != CROWD]
    crowd = [flight for flight in run.flights if flight.trace.session == CROWD]
    met = [is_attained(outcome_of(flight), slo) for flight in rest]
    returned = return_figures(run.visits, [is_attained(outcome_of(visit), slo) for visit in run.visits])
    shares = refused_shares(run.visits, at_s)
    last_at = max(flight.visit.trace.arrival_s for flight in rest)
    by_then = sum(is_met and _ended_at(flight) <= last_at for flight, is_met in zip(rest, met, strict=True))
    return {
        "rest_attained_ratio": sum(met) / len(met),
        "rest_goodput_per_s": by_then / last_at,
        "returns": returned["returns"],
        "admitted_ratio": returned["admitted_ratio"],
        "drained_s": max((_ended_at(flight) for flight in crowd), default=at_s) - at_s if crowd else None,
        "second_peak": max((b - a for a, b in pairwise(shares[1:])), default=0.0),
        "refused_shares": shares,
    }


def refused_shares(visits: Sequence[Flight], at_s: float) -> list[float]:
    """Of the requests that came in each stretch of `WINDOW_S` s from that instant on, the share that was refused."""
    counts: dict[int, list[int]] = {}
    for visit in visits:
        if visit.request.arrived_at >= at_s:
            count = counts.setdefault(int((visit.request.arrived_at - at_s) // WINDOW_S), [0, 0])
            count[0] += outcome_of(visit).status is Status.REFUSED
            count[1] += 1
    windows = range(max(counts, default=-1) + 1)
    return [counts[window][0] / counts[window][1] if window in counts else 0.0 for window in windows]


def _ended_at(flight: Flight) -> float:
    return flight.request.arrived_at + (outcome_of(flight).e2e_s or 0.0)


def main(words: Sequence[str]) -> int:
    """Prints the table; returns 0. Raises ConfigError, TraceError, WorkloadError."""
    parser = argparse.ArgumentParser(prog="sluice bench returns", description=__doc__)
    add_options(parser)
    parser.add_argument("--crowd", type=int, default=200, metavar="N", help="how many come at once (default 200)")
    parser.add_argument("--at", type=float, default=60.0, metavar="S", help="when they come (default 60)")
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    flags = parser.parse_args(words)
    spec = spec_of(flags)
    rows: list[tuple[str, ...]] = []
    for case in CASES:
        told = found(run_case(spec, case, crowd=flags.crowd, at_s=flags.at), flags.at)
        if flags.json:
            print(json.dumps({"case": case.name, **told}, allow_nan=False), flush=True)
        rows.append((case.name, *(_cell(value) for value in told.values() if not isinstance(value, list))))
        print(f"{case.name}: done", file=sys.stderr)
    if not flags.json:
        head = ("", "rest attained", "rest goodput/s", "returns", "admitted", "drained s", "second peak")
        print(columns(head, rows))
    return 0


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3f}"
