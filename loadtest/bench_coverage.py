"""`sluice bench coverage`: do the stated quantiles keep their word, over a workload and through step changes?

Each scenario is a simulation with noisy prefill times and the online predictor. In the middle of its run the world
changes, or does not; the table says how many p90 promises were kept over the whole run, before the change, and of those
made in the first 30 seconds after it and later. Promises made before a change is felt cannot know it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count

from gateway.core.types import Role
from loadtest.exhibit import columns
from loadtest.fault_plan import Fault, FaultKind
from loadtest.promises import Promise, kept_ratio, promises, tbt_predictions, ttft_predictions
from loadtest.sim_options import Spec, add_options, plan_of, spec_of, workload_of
from loadtest.sim_plan import Run
from loadtest.simulator import simulate
from loadtest.workload import TraceRequest

RECOVERY_S = 30.0
"""After a step change, promises must be kept again by then."""
SETTLED_S = 120.0
"""The end of the stretch over which that is judged: some hundred promises, a deviation of 2 to 3 %."""
LONGER = 4
MAX_PROMPT_TOKENS = 131_072


@dataclass(frozen=True, slots=True)
class Scenario:
    """A step change at an instant of the workload."""

    name: str
    faults: Callable[[Spec, float], tuple[Fault, ...]] = lambda spec, at_s: ()
    workload: Callable[[Iterable[TraceRequest], float], Iterator[TraceRequest]] = lambda requests, at_s: iter(requests)


def slower(spec: Spec, at_s: float) -> tuple[Fault, ...]:
    """The first prefill and the first decode engine take twice as long, for good."""
    return tuple(Fault(FaultKind.SLOWS, engine_id, at_s, 1e9, 2.0) for engine_id in _firsts(spec))


def lost(spec: Spec, at_s: float) -> tuple[Fault, ...]:
    """The first prefill engine dies and does not come back."""
    return (Fault(FaultKind.DIES, _firsts(spec)[0], at_s, 1e9, 1.0),)


def longer(requests: Iterable[TraceRequest], at_s: float) -> Iterator[TraceRequest]:
    """Every second prompt from then on is four times as long, and shares no block."""
    number = count()
    for request in requests:
        if request.arrival_s >= at_s and next(number) % 2:
            yield replace(request, prompt_tokens=min(MAX_PROMPT_TOKENS, LONGER * request.prompt_tokens), block_ids=None)
        else:
            yield request


SCENARIOS = (
    Scenario("nothing changes"),
    Scenario("engine 2x slower", faults=slower),
    Scenario("engine lost", faults=lost),
    Scenario("half the prompts 4x longer", workload=longer),
)


def _firsts(spec: Spec) -> list[str]:
    ids = plan_of(spec, 512).fleet.engine_ids
    return list({engine_id[0]: engine_id for engine_id in reversed(ids)}.values())[::-1]


def run_scenario(spec: Spec, scenario: Scenario, at_s: float) -> Run:
    """The run in which the world changes at that instant."""
    workload, block_tokens = workload_of(spec)
    plan = plan_of(replace(spec, faults=(*spec.faults, *scenario.faults(spec, at_s))), block_tokens)
    return simulate(plan, scenario.workload(workload, at_s))


def coverage(made: Sequence[Promise], at_s: float) -> dict[str, float | int | None]:
    """Shares of promises kept, by when they were made."""
    settled = [promise for promise in made if at_s + RECOVERY_S <= promise.made_at < at_s + SETTLED_S]
    return {
        "promises": len(made),
        "overall": kept_ratio(made),
        "before": kept_ratio(made, end_s=at_s),
        "first_30_s": kept_ratio(made, start_s=at_s, end_s=at_s + RECOVERY_S),
        "from_30_to_120_s": kept_ratio(settled),
        "later": kept_ratio(made, start_s=at_s + RECOVERY_S),
    }


def main(words: Sequence[str]) -> int:
    """Prints the table; returns 0. Raises ConfigError, TraceError, WorkloadError."""
    parser = argparse.ArgumentParser(prog="sluice bench coverage", description=__doc__)
    add_options(parser)
    parser.set_defaults(predictor="online", noise=0.1, admission="ttft")
    parser.add_argument("--at", type=float, default=300.0, metavar="S", help="when the world changes (default 300)")
    parser.add_argument("--json", action="store_true", help="one JSON object per scenario and quantity")
    flags = parser.parse_args(words)
    spec = spec_of(flags)
    rows = []
    for scenario in SCENARIOS:
        run = run_scenario(spec, scenario, flags.at)
        for name, role, predictions in (
            ("TTFT", Role.PREFILL, ttft_predictions(run.flights)),
            ("TBT", Role.DECODE, tbt_predictions(run.flights)),
        ):
            found = coverage(promises(predictions, role), flags.at)
            if flags.json:
                print(json.dumps({"scenario": scenario.name, "quantity": name, **found}, allow_nan=False))
            rows.append((f"{scenario.name}, {name}", *map(_cell, found.values())))
        print(f"{scenario.name}: done", file=sys.stderr)
    if not flags.json:
        head = ("p90 kept", "promises", "overall", "before", "first 30 s", "30 to 120 s", "later")
        print(columns(head, rows))
    return 0


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3f}"
