"""Command-line options that the locustfiles add to Locust's own, and what they ask for.

Locust hands them to its workers, so a distributed run is configured at the master alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from locust.env import Environment

from gateway.core.types import Slo
from loadtest.arguments import header, positive, positive_int
from loadtest.generators import SHAPES, generate
from loadtest.replay import Target
from loadtest.traces import FORMATS, read_trace
from loadtest.workload import TraceRequest, WorkloadError, scaled, sliced


def options_of(environment: Environment) -> argparse.Namespace:
    """The options of this run; only after Locust has begun."""
    options: argparse.Namespace | None = environment.parsed_options
    assert options is not None, "Locust was started from its command line"
    return options


def add_common(parser: argparse.ArgumentParser) -> None:
    """What every locustfile asks: the model, the bounds, the limits."""
    group = parser.add_argument_group("Sluice")
    group.add_argument("--model", default="default", help="model name to ask for")
    group.add_argument("--slo-ttft-ms", type=positive, help="bound on the time to the first token")
    group.add_argument("--slo-tbt-ms", type=positive, help="bound on the mean of the slowest 10 %% of token gaps")
    group.add_argument("--timeout-s", type=positive, default=600.0, help="limit for one whole answer")
    group.add_argument("--header", type=header, action="append", default=[], metavar="NAME:VALUE", help="sent along")
    group.add_argument("--report-json", metavar="FILE", help="write the run's figures there when it ends")


def add_trace(parser: argparse.ArgumentParser) -> None:
    """What a replay asks besides: as `sluice replay`."""
    group = parser.add_argument_group("Sluice replay")
    group.add_argument("--trace", metavar="FILE", help="a published trace")
    group.add_argument("--workload", choices=SHAPES, default="azure-conversation", help="without --trace: generated")
    group.add_argument("--format", choices=FORMATS, help="of the trace; default: told by its first line")
    group.add_argument("--seed", type=int, default=0, help="of the generated workload")
    group.add_argument("--seconds", type=positive, default=60.0, help="how much of it, in its own time")
    group.add_argument("--limit", type=positive_int, help="at most so many requests")
    group.add_argument("--speed", type=positive, default=1.0, help="times as fast as recorded")
    group.add_argument("--streams", type=positive_int, default=1000, help="open at once; beyond it the load is late")
    group.add_argument("--characters-per-token", type=positive, default=5.0, help="length of synthetic prompts")
    group.add_argument("--free-output", action="store_true", help="let the model end before the trace's length")


def slo_of(options: argparse.Namespace) -> Slo:
    """The bounds that goodput counts."""
    ttft_ms, tbt_ms = options.slo_ttft_ms, options.slo_tbt_ms
    return Slo(
        ttft_s=None if ttft_ms is None else ttft_ms / 1e3,
        tbt_s=None if tbt_ms is None else tbt_ms / 1e3,
    )


def target_of(options: argparse.Namespace) -> Target:
    """What to send, beside the workload itself."""
    return Target(
        model=options.model,
        headers=tuple(tuple(pair) for pair in options.header),  # a worker gets them as lists
        characters_per_token=options.characters_per_token,
        is_output_forced=not options.free_output,
    )


def workload_of(options: argparse.Namespace) -> list[TraceRequest]:
    """All requests, at the instants at which they are to be sent. Raises WorkloadError, TraceError."""
    if options.trace:
        requests = read_trace(Path(options.trace), options.format)
    else:
        requests = generate(options.workload, seed=options.seed)
    chosen = list(scaled(sliced(requests, seconds=options.seconds, count=options.limit), speed=options.speed))
    if not chosen:
        raise WorkloadError("the workload has no request in that slice", param="seconds")
    return chosen
