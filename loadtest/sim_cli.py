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

from loadtest.sim_html import result_of, run_page
from loadtest.sim_options import Spec, add_options, run_spec, spec_of
from loadtest.sim_report import figures, table


def main(words: Sequence[str]) -> int:
    """Runs one simulation and prints it; returns 0. Raises ConfigError, TraceError, WorkloadError."""
    parser = argparse.ArgumentParser(prog="sluice sim", description="Run the scheduler over a workload, in no time.")
    add_options(parser)
    parser.add_argument("--html", metavar="FILE", help="write a page with plots there")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    flags = parser.parse_args(words)
    spec = spec_of(flags)
    began_s = time.perf_counter()
    run = run_spec(spec)
    took_s = time.perf_counter() - began_s
    print(json.dumps(described_figures(spec, figures(run)), allow_nan=False) if flags.json else table(run))
    if flags.html is not None:
        Path(flags.html).write_text(run_page(result_of(spec, run)), encoding="utf-8")
    print(f"simulated {run.duration_s:.0f} s in {took_s:.1f} s", file=sys.stderr)
    return 0


def described_figures(spec: Spec, values: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for, under `spec`, and the figures."""
    return {"spec": asdict(spec), **values}
