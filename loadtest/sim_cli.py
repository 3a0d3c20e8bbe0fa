"""`sluice sim`: one run of the scheduler in virtual time over engine models, and what it came to."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loadtest.counterfactual import counterfactuals
from loadtest.sim_html import result_of, run_page
from loadtest.sim_options import Spec, add_options, plan_of, run_spec, spec_of, workload_of
from loadtest.sim_plan import Run
from loadtest.sim_report import figures, table

HINDSIGHT = "counterfactual"


def main(words: Sequence[str]) -> int:
    """Runs one simulation and prints it; returns 0. Raises ConfigError, TraceError, WorkloadError."""
    parser = argparse.ArgumentParser(prog="sluice sim", description="Run the scheduler over a workload, in no time.")
    add_options(parser)
    parser.add_argument(
        "--counterfactual-samples",
        type=int,
        default=0,
        metavar="N",
        help="let in N of the refused requests, one at a time, and see whether they would have met their bounds",
    )
    parser.add_argument(
        "--counterfactual-max-s",
        type=float,
        default=300.0,
        metavar="S",
        help="stop looking after so many seconds of real time (default 300)",
    )
    parser.add_argument("--html", metavar="FILE", help="write a page with plots there")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    flags = parser.parse_args(words)
    spec = spec_of(flags)
    began_s = time.perf_counter()
    run = run_spec(spec)
    took_s = time.perf_counter() - began_s
    hindsight = look_back(spec, run, flags.counterfactual_samples, flags.counterfactual_max_s)
    if flags.json:
        print(json.dumps(described_figures(spec, figures(run) | hindsight), allow_nan=False))
    else:
        print("\n".join([table(run), *(f"{name}  {value}" for name, value in hindsight.get(HINDSIGHT, {}).items())]))
    if flags.html is not None:
        Path(flags.html).write_text(run_page(result_of(spec, run)), encoding="utf-8")
    print(f"simulated {run.duration_s:.0f} s in {took_s:.1f} s", file=sys.stderr)
    return 0


def look_back(spec: Spec, run: Run, samples: int, max_s: float) -> dict[str, Any]:
    """What refused requests would have come to, under `counterfactual`; nothing when none are asked for."""
    if samples <= 0:
        return {}
    plan = plan_of(spec, workload_of(spec)[1])
    return {HINDSIGHT: counterfactuals(plan, lambda: workload_of(spec)[0], run, samples=samples, max_s=max_s)}


def described_figures(spec: Spec, values: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for, under `spec`, and the figures."""
    return {"spec": asdict(spec), **values}
