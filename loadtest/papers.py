"""`sluice papers`: published tables and figures beside what the simulator gives."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gateway.core.errors import ConfigError
from loadtest.arguments import positive_int
from loadtest.compare_cli import compare
from loadtest.exhibit import Exhibit, Shown
from loadtest.exhibits_mooncake import figure_5, figure_9, figure_10, figure_15
from loadtest.exhibits_overload import overload, setting_a, setting_b
from loadtest.html_page import heading, page, plots, preformatted
from loadtest.sim_html import Result
from loadtest.sim_options import Spec

OVERLOAD_REQUESTS = 2000
"""Ten minutes of the trace: a run of a few seconds, of which the full table needs 640."""
NAMES = ("figure5", "figure9", "figure10", "figure15", "setting-a", "setting-b", "overload")


def main(words: Sequence[str]) -> int:
    """Runs the exhibits and prints them; returns 0. Raises ConfigError, TraceError."""
    parser = argparse.ArgumentParser(prog="sluice papers", description="Set published figures beside our own.")
    parser.add_argument("--trace", metavar="FILE", required=True, help="the Mooncake conversation trace (JSONL)")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=NAMES, help=f"of {', '.join(NAMES)}")
    parser.add_argument("--full", action="store_true", help="all 128 overload settings, more routers, the clairvoyant")
    parser.add_argument("--requests", type=int, metavar="N", help="only the first N requests of the trace")
    parser.add_argument("--seed", type=int, default=1, metavar="N")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: cores)")
    parser.add_argument("--html", metavar="FILE", help="write a page with plots there")
    parser.add_argument(
        "--overload-requests",
        type=positive_int,
        default=OVERLOAD_REQUESTS,
        metavar="N",
        help=f"the overload table takes the first N requests (default {OVERLOAD_REQUESTS}; the whole trace is 12031)",
    )
    parser.add_argument("--results", metavar="FOLDER", type=Path, help="keep each run there; go on from what is there")
    flags = parser.parse_args(words)
    for name in flags.only:
        if name not in NAMES:
            raise ConfigError(f"--only: unknown {name!r}; known: {', '.join(NAMES)}")
    base = Spec(trace=flags.trace, format="mooncake", seed=flags.seed, requests=flags.requests)
    chosen = exhibits(base, flags.only, is_full=flags.full, overload_requests=flags.overload_requests)
    shown = show(chosen, jobs=flags.jobs, kept=flags.results)
    for exhibit, sight in shown:
        print(f"== {exhibit.title}\n\n{sight.text}\n")
    if flags.html is not None:
        Path(flags.html).write_text(papers_page(shown), encoding="utf-8")
    return 0


def exhibits(
    base: Spec, names: Sequence[str], *, is_full: bool, overload_requests: int = OVERLOAD_REQUESTS
) -> list[Exhibit]:
    """Those exhibits, in the order of NAMES."""
    slice_requests = min(overload_requests, base.requests or overload_requests)
    every = (
        figure_5(base),
        figure_9(base),
        figure_10(base),
        figure_15(base),
        setting_a(base, is_full=is_full),
        setting_b(base, is_full=is_full),
        overload(replace(base, requests=slice_requests), is_full=is_full),
    )
    return [exhibit for exhibit in every if exhibit.name in names]


def show(chosen: Sequence[Exhibit], *, jobs: int, kept: Path | None = None) -> list[tuple[Exhibit, Shown]]:
    """Runs what the exhibits need, each run once, and shows them."""
    specs = list(dict.fromkeys(spec for exhibit in chosen for spec in exhibit.specs))
    results: dict[Spec, Result] = dict(zip(specs, compare(specs, jobs=jobs, kept=kept), strict=True)) if specs else {}
    return [(exhibit, exhibit.show([results[spec] for spec in exhibit.specs])) for exhibit in chosen]


def papers_page(shown: Sequence[tuple[Exhibit, Shown]]) -> str:
    """The exhibits as a page."""
    parts: list[str] = []
    for exhibit, sight in shown:
        parts += [heading(exhibit.title), preformatted(sight.text), plots(sight.charts)]
    return page("sluice papers", parts)
