"""`sluice bench NAME`: the benchmarks, each a module of its own with a `main(words)`."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

BENCHES: dict[str, tuple[str, str]] = {
    "index": ("the prefix index: bytes per block, match and ingestion times", "loadtest.bench_index"),
    "reality": ("predictions against what a real prefill and decode pair did", "loadtest.reality"),
    "tokens": ("tokenising long prompts: time per turn and the event loop's stalls", "loadtest.bench_tokens"),
}


def main(words: Sequence[str]) -> int:
    """Runs the named benchmark with the words after its name; returns its exit code."""
    rows = (f"  {name:<10}{summary}" for name, (summary, _) in BENCHES.items())
    parser = argparse.ArgumentParser(
        prog="sluice bench",
        usage="sluice bench [-h] NAME ...",
        description="Measure a part of Sluice on this machine.",
        epilog="\n".join(("benchmarks:", *rows, "", "sluice bench NAME --help tells more of each.")),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", choices=BENCHES, help="one of those below")
    chosen = parser.parse_args(words[:1])
    return int(importlib.import_module(BENCHES[chosen.name][1]).main(words[1:]))
