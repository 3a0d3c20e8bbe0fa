"""`make loadtest`: Locust replays a workload against the demo's pool, and `sluice replay` sends the same beside it.

Each tool gets a pool and a gateway of its own, so that neither finds the other's prefixes cached. With `--ui` Locust's
web page is served instead, against a pool that stays until Ctrl-C. Locust runs as a process of its own: importing it
would make this one's sockets gevent's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import uvloop

from gateway import logs
from gateway.config import LogFormat, LogLevel, LogSettings
from gateway.core.errors import GatewayError
from gateway.core.types import Slo
from loadtest.arguments import positive, positive_int
from loadtest.demo import SLO, emulated_pool, gateway_at, ready, say
from loadtest.generators import SHAPES
from loadtest.report import Report

LOCUSTFILE = Path(__file__).with_name("locustfile_trace.py")
ENGINES = 4
GRACE_S = 120.0
"""What a run may take beyond the workload's own length."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent, by either tool."""

    workload: str
    seconds: float
    speed: float
    seed: int
    slo: Slo
    processes: int

    @property
    def ends_within_s(self) -> float:
        """Bound on how long either tool may take."""
        return self.seconds / self.speed + GRACE_S

    def words(self) -> list[str]:
        """The options that both tools know."""
        slo = self.slo
        words = ["--workload", self.workload, "--seconds", f"{self.seconds:g}", "--speed", f"{self.speed:g}"]
        words += ["--seed", str(self.seed)]
        words += [] if slo.ttft_s is None else ["--slo-ttft-ms", f"{slo.ttft_s * 1e3:g}"]
        return words + ([] if slo.tbt_s is None else ["--slo-tbt-ms", f"{slo.tbt_s * 1e3:g}"])

    def locust_words(self, url: str, model: str) -> list[str]:
        """Locust's command."""
        words = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--host", url, "--model", model, *self.words()]
        return words + (["--processes", str(self.processes)] if self.processes > 1 else [])


@contextlib.asynccontextmanager
async def pool_and_gateway() -> AsyncIterator[tuple[str, str]]:
    """The demo's engines and a gateway on a free port: its URL and the model."""
    async with emulated_pool() as pool, gateway_at(pool, 0) as gateway:
        await ready(gateway, ENGINES)
        yield gateway.url, pool.model


async def by_locust(load: Load) -> tuple[int, Report | None]:
    """Locust's exit code and the figures it wrote; what it prints goes where ours does."""
    with tempfile.TemporaryDirectory(prefix="sluice-locust-") as folder:
        figures = Path(folder) / "report.json"
        async with pool_and_gateway() as (url, model):
            words = [*load.locust_words(url, model), "--headless", "--only-summary", "--report-json", str(figures)]
            code = await _run(words, within_s=load.ends_within_s)
        return code, Report.from_json(figures.read_text()) if figures.exists() else None


async def by_replay(load: Load) -> Report:
    """The same by `sluice replay`, a process of its own too: what shares a loop with the engines measures itself."""
    async with pool_and_gateway() as (url, model):
        words = [sys.executable, "-m", "loadtest.replay", "--url", url, "--model", model, *load.words(), "--json"]
        process = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.PIPE)
        async with _ended(process, load.ends_within_s):
            text, _ = await process.communicate()
    return Report.from_json(text)


async def with_page(load: Load, *, port: int) -> int:
    """Locust's web page in front of the pool, until Ctrl-C."""
    async with pool_and_gateway() as (url, model):
        say(f"Locust's page is at http://127.0.0.1:{port}; the gateway at {url}")
        return await _run([*load.locust_words(url, model), "--web-host", "127.0.0.1", "--web-port", str(port)])


async def _run(words: Sequence[str], *, within_s: float | None = None) -> int:
    process = await asyncio.create_subprocess_exec(*words)
    async with _ended(process, within_s):
        return await process.wait()


@contextlib.asynccontextmanager
async def _ended(process: asyncio.subprocess.Process, within_s: float | None) -> AsyncIterator[None]:
    """The process is over when this block is. Raises GatewayError when it takes longer."""
    try:
        async with asyncio.timeout(within_s):
            yield
    except TimeoutError:
        raise GatewayError(f"the load was not over within {within_s:g} s") from None
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()


def compared(locust: Report, own: Report) -> list[tuple[str, float | None, float | None]]:
    """What both tools measured, a row each: name, Locust's figure, `sluice replay`'s."""
    return [
        ("requests", float(locust.requests), float(own.requests)),
        ("attained", locust.attained_ratio, own.attained_ratio),
        ("goodput/s", locust.goodput_per_s, own.goodput_per_s),
        ("TTFT p50 ms", _ms(locust.ttft_s.p50), _ms(own.ttft_s.p50)),
        ("TTFT p90 ms", _ms(locust.ttft_s.p90), _ms(own.ttft_s.p90)),
        ("TBT p50 ms", _ms(locust.tbt_s.p50), _ms(own.tbt_s.p50)),
        ("TBT p90 ms", _ms(locust.tbt_s.p90), _ms(own.tbt_s.p90)),
    ]


def table(rows: Sequence[tuple[str, float | None, float | None]]) -> str:
    """The comparison for people."""
    lines = [f"{'':<14}{'locust':>12}{'sluice replay':>16}{'differs':>10}"]
    for name, ours, theirs in rows:
        differs = "-" if not ours or not theirs else f"{ours / theirs - 1:+.1%}"
        cells = ("-" if value is None else f"{value:.3f}" for value in (ours, theirs))
        lines.append(f"{name:<14}{next(cells):>12}{next(cells):>16}{differs:>10}")
    return "\n".join(lines)


def _ms(value_s: float | None) -> float | None:
    return None if value_s is None else value_s * 1e3


def main(words: Sequence[str] | None = None) -> int:
    """0 when no request failed under either tool, 1 otherwise, 2 on bad input."""
    flags = _parser().parse_args(words)
    load = Load(flags.workload, flags.seconds, flags.speed, flags.seed, SLO, flags.processes)
    logs.configure(LogSettings(format=LogFormat.CONSOLE, level=LogLevel.WARNING))
    try:
        return _main(load, flags)
    except GatewayError as error:
        print(f"loadtest: {error.message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _main(load: Load, flags: argparse.Namespace) -> int:
    if flags.ui:
        return uvloop.run(with_page(load, port=flags.web_port))
    code, locust = uvloop.run(by_locust(load))
    if locust is None or flags.no_replay:
        return code
    own = uvloop.run(by_replay(load))
    rows = compared(locust, own)
    if flags.json:
        print(json.dumps({"locust": asdict(locust), "replay": asdict(own)}, allow_nan=False))
    else:
        print(f"\nThe same workload by both tools\n{table(rows)}")
    return 1 if code or own.errors else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest.locust_demo", description=__doc__)
    parser.add_argument("--workload", choices=SHAPES, default="azure-conversation", help="what is sent")
    parser.add_argument("--seconds", type=positive, default=30.0, help="how much of it (default 30)")
    parser.add_argument("--speed", type=positive, default=1.0, help="times as fast as recorded")
    parser.add_argument("--seed", type=int, default=0, help="of the workload")
    parser.add_argument("--processes", type=positive_int, default=1, help="Locust workers (default 1: no workers)")
    parser.add_argument("--no-replay", action="store_true", help="Locust only")
    parser.add_argument("--ui", action="store_true", help="serve Locust's web page until Ctrl-C")
    parser.add_argument("--web-port", type=positive_int, default=8089, help="of that page (default 8089)")
    parser.add_argument("--json", action="store_true", help="both reports as JSON, after Locust's own output")
    return parser


if __name__ == "__main__":
    sys.exit(main())
