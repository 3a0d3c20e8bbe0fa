"""`sluice bench NAME`: the benchmarks, each a module of its own with a `main(words)`."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

BENCHES: dict[str, tuple[str, str]] = {
    "faults": (
        "every failure of every connector on emulated engines: ending, time, stranded KV",
        "loadtest.bench_faults",
    ),
    "decide": ("one decision alone, by pairs of engines and length of the prompt", "loadtest.bench_decide"),
    "coverage": ("stated quantiles against what happened, through step changes", "loadtest.bench_coverage"),
    "index": ("the prefix index: bytes per block, match and ingestion times", "loadtest.bench_index"),
    "overload-http": ("attained under overload over real HTTP, and simulated", "loadtest.bench_overload_http"),
    "relay": ("the gateway beside other proxies: processor time, time added to first tokens", "loadtest.bench_relay"),
    "reality": ("predictions against what a real prefill and decode pair did", "loadtest.reality"),
    "returns": ("clients that come back as told, a crowd, one that hammers, simulated", "loadtest.bench_returns"),
    "streams": ("thousands of streams at once: memory, losses, delay per token", "loadtest.bench_streams"),
    "store": ("sharing one view over Redis: events per second, bytes, processor share, age", "loadtest.bench_store"),
    "tenants": ("shares of tenants and classes under overload, simulated", "loadtest.bench_tenants"),
    "tokens": ("tokenising long prompts: time per turn and the event loop's stalls", "loadtest.bench_tokens"),
}


def main(words: Sequence[str]) -> int:
    """Runs the named benchmark with the words after its name; returns its exit code."""
    rows = (f"  {name:<15}{summary}" for name, (summary, _) in BENCHES.items())
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
