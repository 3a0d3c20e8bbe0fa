"""How long one decision takes, alone: matching, predicting, admitting, choosing and booking, without any network.

A decision is `Scheduler.decide` for a prompt whose blocks are hashed already, on a pool that is busy: every engine has
requests in flight and a part of the prompt cached. What is measured ends before the request's `Left`, which keeps the
pool as it was. Wall time of this thread with the garbage collector as it runs in a gateway; on a busy machine the p99
is the machine's, so processor time of the same decisions stands beside it.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from gateway.app import scheduler_of
from gateway.config import Config, IndexSettings, resolve
from gateway.core.blocks import hash_prompt
from gateway.core.events import BlocksStored, EngineFound, EngineHealth, EngineReport, Left
from gateway.core.scheduler import Scheduler
from gateway.core.types import Dispatch, Engine, Health, Report, Request, Role
from loadtest.arguments import positive_int
from loadtest.bench_relay import quantile

BLOCK_TOKENS = 16
PROMPTS = 16
"""Different ones, taken in turn."""
IN_FLIGHT = 4
"""Requests per prefill engine before the measurement, and in all."""
MOST_IN_FLIGHT = 256


@dataclass(frozen=True, slots=True)
class Shape:
    """One pool and one length of prompt."""

    prefills: int
    decodes: int
    prompt_tokens: int
    goal_us: float | None = None
    """Of the 99th percentile."""


SHAPES = (
    Shape(4, 4, 8_192, 150.0),
    Shape(4, 4, 32_768),
    Shape(8, 8, 32_768),
    Shape(16, 16, 32_768),
    Shape(32, 32, 8_192),
    Shape(32, 32, 32_768, 1_000.0),
    Shape(64, 64, 32_768),
    Shape(128, 128, 32_768),
    Shape(256, 256, 32_768),
    Shape(256, 256, 131_072),
)


@dataclass(frozen=True, slots=True)
class Figure:
    """What one shape came to."""

    prefills: int
    decodes: int
    prompt_blocks: int
    p50_us: float
    p99_us: float
    cpu_us: float
    """Mean processor time."""
    hash_us: float
    """Hashing the prompt's blocks, which comes before the decision."""
    goal_us: float | None

    @property
    def is_met(self) -> bool | None:
        """Whether the 99th percentile keeps the goal; None without one."""
        return None if self.goal_us is None else self.p99_us <= self.goal_us


def main(argv: Sequence[str]) -> int:
    """Runs the bench and prints a table, or JSON with `--json`; returns 1 when a goal was missed."""
    parser = argparse.ArgumentParser(prog="sluice bench decide", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--decisions", type=positive_int, default=1000, help="measured per shape")
    parser.add_argument("--seed", type=int, default=1)
    flags = parser.parse_args(argv)
    figures = [measure(shape, flags.decisions, flags.seed) for shape in SHAPES]
    rows = [{**asdict(figure), "is_met": figure.is_met} for figure in figures]
    print(json.dumps(rows, indent=2) if flags.json else render(figures))
    return 1 if any(figure.is_met is False for figure in figures) else 0


def measure(shape: Shape, decisions: int, seed: int) -> Figure:
    """The figure for that shape over so many decisions."""
    rng = random.Random(seed)
    scheduler = scheduler_of(resolve(Config(index=IndexSettings(max_blocks=1_000_000))), seed=seed)
    requests, hash_us = _prompts(shape, seed)
    _fill(scheduler, shape, requests, rng)
    samples, now = [], 10.0
    cpu_s = 0.0
    for number in range(decisions):
        now += 0.001
        request = replace(requests[number % PROMPTS], id=f"r{number}", arrived_at=now)
        before_s, began_s = time.thread_time(), time.perf_counter()
        decision = scheduler.decide(request, now=now)
        samples.append(time.perf_counter() - began_s)
        cpu_s += time.thread_time() - before_s
        assert isinstance(decision, Dispatch), decision
        scheduler.apply(Left(request.id), now=now)
    return Figure(
        prefills=shape.prefills,
        decodes=shape.decodes,
        prompt_blocks=shape.prompt_tokens // BLOCK_TOKENS,
        p50_us=quantile(samples, 0.5) * 1e6,
        p99_us=quantile(samples, 0.99) * 1e6,
        cpu_us=cpu_s / decisions * 1e6,
        hash_us=hash_us,
        goal_us=shape.goal_us,
    )


def _prompts(shape: Shape, seed: int) -> tuple[list[Request], float]:
    """Requests with hashed prompts, and the microseconds that hashing one takes."""
    generator = np.random.default_rng(seed)
    requests, spent_s = [], 0.0
    for number in range(PROMPTS):
        tokens = generator.integers(0, 150_000, shape.prompt_tokens, dtype=np.int32)
        before_s = time.thread_time()
        hashes = hash_prompt(tokens, BLOCK_TOKENS)
        spent_s += time.thread_time() - before_s
        requests.append(
            Request(
                id=f"p{number}",
                model="m",
                arrived_at=0.0,
                prompt_tokens=shape.prompt_tokens,
                is_prompt_exact=True,
                max_output_tokens=256,
                can_hand_off=True,
                block_hashes={BLOCK_TOKENS: hashes},
            )
        )
    return requests, spent_s / PROMPTS * 1e6


def _fill(scheduler: Scheduler, shape: Shape, requests: Sequence[Request], rng: random.Random) -> None:
    """Makes the pool: engines that are up and reported, parts of the prompts cached, requests in flight."""
    names = [(f"p{n:03}", Role.PREFILL) for n in range(shape.prefills)]
    names += [(f"d{n:03}", Role.DECODE) for n in range(shape.decodes)]
    for name, role in names:
        engine = Engine(name, f"http://{name}:8000", role, models=("m",), block_tokens=BLOCK_TOKENS)
        engine = replace(engine, kv_capacity_tokens=2_000_000)
        scheduler.apply(EngineFound(engine), now=0.0)
        scheduler.apply(EngineHealth(name, Health.UP, ""), now=0.0)
        report = Report(running_count=rng.randrange(8), waiting_count=0, kv_usage_ratio=rng.random() / 2)
        scheduler.apply(EngineReport(name, report), now=9.9)
        for request in requests if role is Role.PREFILL else ():
            hashes = request.block_hashes[BLOCK_TOKENS]
            scheduler.apply(BlocksStored(name, BLOCK_TOKENS, hashes[: rng.randrange(len(hashes))]), now=9.9)
    for number in range(min(IN_FLIGHT * shape.prefills, MOST_IN_FLIGHT)):
        request = replace(requests[number % PROMPTS], id=f"busy{number}", arrived_at=10.0)
        scheduler.decide(request, now=10.0)


def render(figures: Sequence[Figure]) -> str:
    """A table for people."""
    lines = [f"{'pairs':<12}{'blocks':>8}{'p50 us':>10}{'p99 us':>10}{'cpu us':>10}{'hashing us':>12}{'goal p99':>14}"]
    for row in figures:
        mark = {True: "ok", False: "MISSED", None: ""}[row.is_met]
        goal = "" if row.goal_us is None else f"{row.goal_us:,.0f} {mark}"
        pairs = f"{row.prefills} x {row.decodes}"
        lines.append(
            f"{pairs:<12}{row.prompt_blocks:>8}{row.p50_us:>10,.0f}{row.p99_us:>10,.0f}{row.cpu_us:>10,.0f}"
            f"{row.hash_us:>12,.0f}{goal:>14}"
        )
    return "\n".join(lines)
