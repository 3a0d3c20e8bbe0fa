"""`sluice compare`: policies x admission rules x speeds x seeds, each a simulation in a process of its own."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from multiprocessing import get_context
from pathlib import Path

from gateway.admissions import DEFAULT_ADMISSION
from gateway.core.errors import ConfigError
from gateway.policies import POLICIES
from loadtest.exhibit import columns
from loadtest.results import load, save
from loadtest.sim_cli import described_figures
from loadtest.sim_html import HEAD, Result, comparison_page, name_of, result_of, row_of
from loadtest.sim_options import DEFAULT_POLICY, SIM_ADMISSIONS, Spec, add_options, run_spec, spec_of

BAR_WIDTH = 30


def main(words: Sequence[str]) -> int:
    """Runs the comparison and prints it; returns 0. Raises ConfigError, TraceError, WorkloadError."""
    parser = argparse.ArgumentParser(prog="sluice compare", description="Simulate policies x speeds x seeds.")
    add_options(parser, is_comparison=True)
    what = parser.add_argument_group("comparison (each takes several)")
    what.add_argument("--policy", nargs="+", default=[DEFAULT_POLICY], metavar="NAME", help="`all` stands for each")
    what.add_argument("--admission", nargs="+", default=[DEFAULT_ADMISSION], metavar="NAME", help="`all` too")
    what.add_argument("--speed", nargs="+", type=float, default=[1.0], metavar="X")
    what.add_argument("--seed", nargs="+", type=int, default=[0], metavar="N")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: cores)")
    parser.add_argument("--results", metavar="FOLDER", type=Path, help="keep each run there; go on from what is there")
    parser.add_argument("--json", action="store_true", help="one JSON object per line and run instead of a table")
    parser.add_argument("--html", metavar="FILE", help="write a page with plots there")
    flags = parser.parse_args(words)
    if flags.jobs < 1:
        raise ConfigError(f"--jobs must be at least 1, not {flags.jobs}")
    results = compare(list(specs_of(flags)), jobs=flags.jobs, kept=flags.results)
    print("\n".join(json_lines(results)) if flags.json else text_table(results))
    if flags.html is not None:
        Path(flags.html).write_text(comparison_page(results), encoding="utf-8")
    return 0


def specs_of(flags: argparse.Namespace) -> Iterator[Spec]:
    """Every combination that the flags name."""
    policies = list(POLICIES) if flags.policy == ["all"] else flags.policy
    admissions = list(SIM_ADMISSIONS) if flags.admission == ["all"] else flags.admission
    for policy, admission, speed, seed in product(policies, admissions, flags.speed, flags.seed):
        yield spec_of(flags, policy=policy, admission=admission, speed=speed, seed=seed)


def compare(specs: Sequence[Spec], *, jobs: int, kept: Path | None = None) -> list[Result]:
    """The results in the order of `specs`; progress goes to standard error. The first failure ends it.

    With a folder in `kept` what was run before is read from it, and what is run now is written to it, one by one.
    """
    results = {} if kept is None else _kept_results(specs, kept)
    if results:
        print(f"{len(results)} of {len(specs)} runs were kept from before", file=sys.stderr)
    missing = [number for number in range(len(specs)) if number not in results]
    if not missing:
        return [results[number] for number in range(len(specs))]
    # `spawn`: a child forked from a process that has threads (numpy's) can hang.
    with ProcessPoolExecutor(min(jobs, len(missing)), mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(run_one, specs[number]): number for number in missing}
        try:
            for done in as_completed(waiting):
                number = waiting[done]
                results[number] = done.result()
                if kept is not None:
                    save(kept, results[number])
                show_progress(len(results), len(specs), f"{name_of(specs[number])} {specs[number].speed:g}x")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [results[number] for number in range(len(specs))]


def _kept_results(specs: Sequence[Spec], folder: Path) -> dict[int, Result]:
    found = {number: load(folder, spec) for number, spec in enumerate(specs)}
    return {number: result for number, result in found.items() if result is not None}


def run_one(spec: Spec) -> Result:
    """One run, in whatever process."""
    return result_of(spec, run_spec(spec))


def show_progress(done: int, total: int, last: str) -> None:
    """A bar on a terminal, a line elsewhere."""
    filled = BAR_WIDTH * done // total
    line = f"[{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {done}/{total}  {last}"
    is_terminal = sys.stderr.isatty()
    end = "\n" if not is_terminal or done == total else ""
    print(f"\r\x1b[2K{line}" if is_terminal else line, end=end, file=sys.stderr, flush=True)


def json_lines(results: Iterable[Result]) -> Iterator[str]:
    """Each run as `sluice sim --json` prints it."""
    return (json.dumps(described_figures(result.spec, result.figures), allow_nan=False) for result in results)


def text_table(results: Iterable[Result]) -> str:
    """A row for each run."""
    return columns(HEAD, [row_of(result) for result in results])
