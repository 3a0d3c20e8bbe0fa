"""Replays a workload against a gateway in real time and reports what came of it: `sluice replay`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import uvloop

from adapters.headers import DEADLINE, TBT, TPOT, TTFT
from gateway.core.errors import GatewayError
from gateway.core.types import Slo
from loadtest.answer import ClientResult
from loadtest.arguments import header, positive, positive_int, url
from loadtest.client import ClientRequest, LoadClient, chat_request
from loadtest.generators import SHAPES, generate
from loadtest.prompts import synthesise
from loadtest.report import Outcome, Report, Status, summarise
from loadtest.traces import FORMATS, read_trace
from loadtest.workload import TraceRequest, WorkloadError, scaled, sliced

LATE_S = 0.1
"""A client whose 99 % lag is above this measured itself as much as the gateway."""


@dataclass(frozen=True, slots=True)
class Target:
    """What to send, beside the workload itself."""

    model: str
    headers: tuple[tuple[str, str], ...] = ()
    characters_per_token: float = 5.0
    is_stream: bool = True
    is_output_forced: bool = True
    """Ask engines for exactly the trace's output tokens (`ignore_eos`, which vLLM and SGLang know)."""


async def replay(
    url: str,
    workload: Iterable[TraceRequest],
    target: Target,
    *,
    slo: Slo,
    speed: float = 1.0,
    max_in_flight: int = 1024,
    timeout_s: float = 600.0,
    on_progress: Callable[[Outcome], None] | None = None,
) -> Report:
    """The report of the workload, sent to `url` at its own instants divided by `speed`.

    `on_progress` gets each outcome as it ends; on cancellation these are all that is known. Raises WorkloadError.
    """
    outcomes: list[Outcome] = []

    def ended(result: ClientResult) -> None:
        outcomes.append(result.outcome)
        if on_progress is not None:
            on_progress(outcomes[-1])

    requests = client_requests(scaled(workload, speed=speed), target)
    async with LoadClient(url, max_in_flight=max_in_flight, timeout_s=timeout_s, keep_text=False) as client:
        await client.run(requests, ended)
    return summarise(outcomes, slo)


def client_requests(workload: Iterable[TraceRequest], target: Target) -> Iterator[ClientRequest]:
    extra = {"ignore_eos": True} if target.is_output_forced else {}
    for number, request in enumerate(workload):
        yield chat_request(
            synthesise(request, characters_per_token=target.characters_per_token, salt=str(number)),
            model=target.model,
            due_s=request.arrival_s,
            max_tokens=request.output_tokens,
            is_stream=target.is_stream,
            prompt_tokens=request.prompt_tokens,
            headers=target.headers,
            **extra,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Replay from the command line: 0 when nothing failed (a refusal is an answer), 1 when a request failed, 2 on bad
    input, 130 when interrupted, after the report of what had ended."""
    options = _parser().parse_args(argv)
    slo = scaled_slo(options)
    progress = Progress(sys.stderr)
    try:
        report = uvloop.run(_replay_options(options, slo, progress))
    except GatewayError as error:
        print(f"sluice replay: {error.message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        _show(summarise(progress.outcomes, slo), options.json)
        return 130
    _show(report, options.json)
    return 1 if report.errors else 0


async def _replay_options(options: argparse.Namespace, slo: Slo, progress: Progress) -> Report:
    return await replay(
        options.url,
        _workload(options),
        Target(
            model=options.model,
            headers=(*options.header, *(slo_headers(slo) if options.send_slo else ())),
            characters_per_token=options.characters_per_token,
            is_stream=not options.no_stream,
            is_output_forced=not options.free_output,
        ),
        slo=slo,
        speed=options.speed * options.scale,
        max_in_flight=options.max_in_flight,
        timeout_s=options.timeout_s,
        on_progress=progress.add,
    )


def scaled_slo(options: argparse.Namespace) -> Slo:
    """The bounds on the wall clock: with `--scale` everything is so many times as fast, promises too."""
    bounds_ms = {"ttft_s": options.slo_ttft_ms, "tbt_s": options.slo_tbt_ms, "deadline_s": options.slo_deadline_ms}
    return Slo(**{name: _ms_to_s(bound_ms / options.scale) for name, bound_ms in bounds_ms.items() if bound_ms})


def slo_headers(slo: Slo) -> tuple[tuple[str, str], ...]:
    """The headers that ask a gateway for these bounds, milliseconds."""
    named = ((TTFT, slo.ttft_s), (TBT, slo.tbt_s), (TPOT, slo.tpot_s), (DEADLINE, slo.deadline_s))
    return tuple((name, f"{bound_s * 1e3:.3f}") for name, bound_s in named if bound_s is not None)


def _workload(options: argparse.Namespace) -> Iterable[TraceRequest]:
    """What was asked for. Of a trace all of it is read before the first request leaves: damage must not cut a run."""
    if options.trace is not None:
        return list(sliced(read_trace(options.trace, options.format), seconds=options.seconds, count=options.limit))
    if options.seconds is None and options.limit is None:
        raise WorkloadError("a generated workload has no end: give --seconds or --limit", param="seconds")
    return sliced(generate(options.workload, seed=options.seed), seconds=options.seconds, count=options.limit)


def _show(report: Report, is_json: bool) -> None:
    print(report.to_json() if is_json else report.to_table())
    lag_s = report.lag_s.p99
    if lag_s is not None and lag_s > LATE_S:
        warning = f"this client itself was late (99 %: {lag_s:.3f} s), and its lag is part of the latencies"
        print(f"sluice replay: {warning}", file=sys.stderr)


class Progress:
    """Keeps the outcomes so far; on a terminal, one line counts them."""

    def __init__(self, stream: TextIO) -> None:
        self.outcomes: list[Outcome] = []
        self._counts = dict.fromkeys(Status, 0)
        self._stream = stream
        self._is_terminal = stream.isatty()

    def add(self, outcome: Outcome) -> None:
        """One more request ended."""
        self.outcomes.append(outcome)
        self._counts[outcome.status] += 1
        if self._is_terminal:
            line = ", ".join(f"{count} {status}" for status, count in self._counts.items())
            print(f"\r\x1b[K{line}", end="", file=self._stream, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sluice replay", description=__doc__)
    parser.add_argument("--url", required=True, type=url, help="base URL of the gateway, without /v1")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--trace", type=Path, metavar="FILE", help="a published trace")
    source.add_argument("--workload", choices=SHAPES, help="a generated workload")
    parser.add_argument("--format", choices=FORMATS, help="of the trace; default: told by its first line")
    parser.add_argument("--seed", type=int, default=0, help="of the generated workload")
    parser.add_argument("--seconds", type=positive, help="how much of the workload, in its own time")
    parser.add_argument("--limit", type=positive_int, help="at most so many requests")
    parser.add_argument("--speed", type=positive, default=1.0, help="times as fast as recorded")
    parser.add_argument("--model", default="default", help="model name to ask for")
    parser.add_argument("--slo-ttft-ms", type=positive, help="bound on the time to the first token")
    parser.add_argument("--slo-tbt-ms", type=positive, help="bound on the mean of the slowest 10 %% of token gaps")
    parser.add_argument("--slo-deadline-ms", type=positive, help="bound on the whole answer")
    parser.add_argument("--send-slo", action="store_true", help="ask the gateway for these bounds, in headers")
    parser.add_argument(
        "--scale", type=positive, default=1.0, help="time itself so many times as fast: arrivals and bounds"
    )
    parser.add_argument("--max-in-flight", type=positive_int, default=1024, help="beyond it the client is late")
    parser.add_argument("--timeout-s", type=positive, default=600.0, help="limit for one whole answer")
    parser.add_argument("--header", type=header, action="append", default=[], metavar="NAME:VALUE", help="sent along")
    parser.add_argument("--characters-per-token", type=positive, default=5.0, help="length of synthetic prompts")
    parser.add_argument("--no-stream", action="store_true", help="ask for whole answers; TTFT and TBT stay unseen")
    parser.add_argument("--free-output", action="store_true", help="let the model end before the trace's length")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def _ms_to_s(value_ms: float | None) -> float | None:
    return None if value_ms is None else value_ms / 1e3


if __name__ == "__main__":
    sys.exit(main())
