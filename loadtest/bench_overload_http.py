"""`sluice bench overload-http`: what rejection is worth over real HTTP, beside the simulator's figure for the same run.

Emulated engines take a profile's times; `sluice serve` stands in front of them as a process of its own, cold and
without a profile; a client sends the workload at its own instants. Three figures come out: attained over HTTP, attained
in the simulator with the same settings, and attained over HTTP by a proxy that goes round robin and admits everybody.

Time is scaled: engines, arrivals and bounds are all `--scale` times as fast, the gateway's own work is not. The larger
the scale the shorter the run and the heavier the gateway, the client and the engines weigh on the same machine; the
client's lag in the result says when they weigh too much.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import uvloop

from gateway.admissions import ADMISSIONS
from gateway.config import Config
from gateway.core.admission import AdmissionLimits
from gateway.core.types import Role, Slo
from gateway.plugins import plug_in
from gateway.policies import POLICIES
from loadtest.arguments import positive, positive_int
from loadtest.fabric import Fabric
from loadtest.fake_engine import FakeCluster, FakeEngine, FakeSettings
from loadtest.gateway_process import served
from loadtest.generators import SHAPES, generate
from loadtest.replay import Target, replay
from loadtest.report import Report
from loadtest.sim_engines import Fleet, settings_of
from loadtest.sim_plan import Plan
from loadtest.sim_report import figures
from loadtest.simulator import simulate
from loadtest.traces import read_trace
from loadtest.workload import TraceRequest, scaled, sliced
from predictors import predictor
from predictors.profile import Profile, load_profile

CHARACTERS_PER_TOKEN = 2.5
"""A word of four letters and a space is two tokens of the emulated engines' tokenizer."""
MAX_IN_FLIGHT = 4_096
DEFAULTS = Config()


@dataclass(frozen=True, slots=True)
class Setting:
    """What is measured."""

    trace: Path | None
    workload: str
    seconds: float
    speed: float
    scale: float
    prefill: int
    decode: int
    profile: str
    slo: Slo
    policy: str
    admission: str
    seed: int = 0

    @property
    def fleet(self) -> Fleet:
        return Fleet(load_profile(self.profile), prefill=self.prefill, decode=self.decode, can_share_prefixes=False)

    def requests(self) -> list[TraceRequest]:
        """The workload's first `seconds`, arrivals sped up."""
        source = generate(self.workload, seed=self.seed) if self.trace is None else read_trace(self.trace)
        return list(scaled(sliced(source, seconds=self.seconds), speed=self.speed))

    @property
    def scaled_slo(self) -> Slo:
        """The bounds as the clock on the wall has them."""
        ttft_s, tbt_s = self.slo.ttft_s, self.slo.tbt_s
        return Slo(ttft_s=ttft_s and ttft_s / self.scale, tbt_s=tbt_s and tbt_s / self.scale)


def simulated(setting: Setting) -> dict[str, Any]:
    """The simulator's figures for the gateway's own settings: the same limits, a predictor that knows nothing."""
    plan = Plan(
        fleet=setting.fleet,
        policy=plug_in("policy", POLICIES, setting.policy, {}),
        admission=plug_in("admission", ADMISSIONS, setting.admission, {}),
        predictor=predictor(DEFAULTS.predictor.name),
        slo=setting.slo,
        seed=setting.seed,
        limits=AdmissionLimits(
            max_in_flight_per_engine=DEFAULTS.admission.max_in_flight_per_engine,
            max_waiting=DEFAULTS.admission.max_waiting,
            max_wait_s=DEFAULTS.admission.max_wait_s,
        ),
    )
    told = figures(simulate(plan, setting.requests()))
    return {name: told[name] for name in ("requests", "attained_ratio", "attained_tokens_ratio", "rejected")}


async def over_http(setting: Setting, directory: Path, *, policy: str, admission: str) -> dict[str, Any]:
    """The client's figures for a cold gateway with that policy and rule."""
    async with FakeCluster(speed=setting.scale, fabric=fabric_of(setting.fleet.profile)) as cluster:
        engines = [await cluster.start(settings) for settings in fake_engines(setting)]
        words = [*serve_words(setting, engines), "--policy", policy, "--admission", admission]
        async with served(words, directory / "gateway.log") as url:
            report = await send(url, setting, engines[0].settings.model)
    return told_of(report)


def fake_engines(setting: Setting) -> Iterable[FakeSettings]:
    """The simulator's engines, over HTTP. Leases last as long on the wall as real engines' do."""
    fleet = setting.fleet
    for role in (Role.PREFILL,) * setting.prefill + (Role.DECODE,) * setting.decode:
        own = replace(settings_of(role, fleet), lease_s=30 * setting.scale, lease_extension_s=20 * setting.scale)
        yield FakeSettings(engine=own, times=fleet.profile, has_prompt_tokens_details=True)


def fabric_of(profile: Profile) -> Fabric:
    return Fabric(bytes_per_s=profile.link_bytes_per_s, latency_s=profile.link_base_s)


def serve_words(setting: Setting, engines: Sequence[FakeEngine]) -> list[str]:
    """The flags of `sluice serve`: engines and bounds, nothing else."""
    words = [word for engine in engines for word in (f"--{engine.settings.engine.role.value}", engine.url)]
    slo = setting.scaled_slo
    for flag, bound_s in (("--slo-ttft-ms", slo.ttft_s), ("--slo-tbt-ms", slo.tbt_s)):
        words += [] if bound_s is None else [flag, f"{bound_s * 1e3:g}"]
    return words


async def send(url: str, setting: Setting, model: str) -> Report:
    """The workload at its instants."""
    target = Target(model=model, characters_per_token=CHARACTERS_PER_TOKEN)
    return await replay(
        url,
        setting.requests(),
        target,
        slo=setting.scaled_slo,
        speed=setting.scale,
        max_in_flight=MAX_IN_FLIGHT,
    )


def told_of(report: Report) -> dict[str, Any]:
    """What is kept of a report; the lag is the client's own, seconds on the wall."""
    return {
        "requests": report.requests,
        "attained_ratio": report.attained_ratio,
        "attained_tokens_ratio": report.attained_tokens_ratio,
        "refused": report.refused,
        "errors": report.errors,
        "reasons": report.reasons,
        "ttft_p50_s": report.ttft_s.p50,
        "ttft_p90_s": report.ttft_s.p90,
        "tbt_p50_s": report.tbt_s.p50,
        "tbt_p90_s": report.tbt_s.p90,
        "client_lag_p99_s": report.lag_s.p99,
    }


def measured(setting: Setting, *, is_baseline_wanted: bool) -> dict[str, Any]:
    """All three figures."""
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        told: dict[str, Any] = {"simulator": simulated(setting)}
        told["http"] = uvloop.run(over_http(setting, directory, policy=setting.policy, admission=setting.admission))
        if is_baseline_wanted:
            told["http_round_robin"] = uvloop.run(over_http(setting, directory, policy="round_robin", admission="none"))
    return told


def main(words: Sequence[str]) -> int:
    """Prints the figures; returns 0. Raises GatewayError."""
    flags = _parser().parse_args(words)
    setting = Setting(
        trace=flags.trace,
        workload=flags.workload,
        seconds=flags.seconds,
        speed=flags.speed,
        scale=flags.scale,
        prefill=flags.prefill,
        decode=flags.decode,
        profile=flags.profile,
        slo=Slo(ttft_s=flags.slo_ttft_ms / 1e3, tbt_s=flags.slo_tbt_ms / 1e3),
        policy=flags.policy,
        admission=flags.admission,
        seed=flags.seed,
    )
    os.nice(flags.nice)
    print(f"load average at the start: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", file=sys.stderr)
    told = measured(setting, is_baseline_wanted=not flags.no_baseline)
    print(json.dumps(told) if flags.json else table(told))
    return 0


def table(told: dict[str, dict[str, Any]]) -> str:
    """The figures for people."""
    lines = [f"{'':<18}{'requests':>9}{'attained':>10}{'of tokens':>11}{'refused':>9}"]
    for name, row in told.items():
        refused = row.get("refused", row.get("rejected"))
        ratios = f"{row['attained_ratio']:>10.3f}{row['attained_tokens_ratio']:>11.3f}"
        lines.append(f"{name:<18}{row['requests']:>9}{ratios}{refused:>9}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sluice bench overload-http", description=__doc__)
    parser.add_argument("--trace", type=Path, metavar="FILE", help="a published trace (default: generated)")
    parser.add_argument("--workload", choices=SHAPES, default="conversation", help="generated (default: conversation)")
    parser.add_argument("--seconds", type=positive, default=600.0, help="how much of it, in its own time (default 600)")
    parser.add_argument("--speed", type=positive, default=1.0, help="arrivals so many times as fast (default 1)")
    parser.add_argument("--scale", type=positive, default=2.0, help="everything so many times as fast (default 2)")
    parser.add_argument("--prefill", type=positive_int, default=4, metavar="N", help="prefill engines (default 4)")
    parser.add_argument("--decode", type=positive_int, default=1, metavar="N", help="decode engines (default 1)")
    parser.add_argument("--profile", default="llama3-70b-8xa800-reference", metavar="NAME|FILE", help="their times")
    parser.add_argument("--slo-ttft-ms", type=positive, default=10_000.0, help="in the trace's time (default 10000)")
    parser.add_argument("--slo-tbt-ms", type=positive, default=50.0, help="in the trace's time (default 50)")
    parser.add_argument("--policy", default=DEFAULTS.policy.name, help="of the gateway (default: its own)")
    parser.add_argument("--admission", default="predicted", help="rule of the gateway (default predicted)")
    parser.add_argument("--seed", type=int, default=0, help="of a generated workload")
    parser.add_argument("--nice", type=int, default=0, help="lower priority by so much, engines and client included")
    parser.add_argument("--no-baseline", action="store_true", help="leave the round-robin proxy out")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser
