"""What the command line of a simulation says, as one picklable value, and the run that it asks for."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, islice, tee
from pathlib import Path

from gateway.admissions import ADMISSIONS, DEFAULT_ADMISSION
from gateway.config import Config
from gateway.core.errors import ConfigError
from gateway.core.types import Slo
from gateway.plugins import plug_in
from gateway.policies import POLICIES
from loadtest.clairvoyant import NAME as CLAIRVOYANT
from loadtest.clairvoyant import search
from loadtest.fault_plan import Fault, draw_faults, parse_fault
from loadtest.generators import SHAPES, generate
from loadtest.sim_engines import Fleet
from loadtest.sim_plan import Plan, Run
from loadtest.sim_returns import Manner, Returning
from loadtest.simulator import simulate
from loadtest.traces import FORMATS, read_trace
from loadtest.workload import BLOCK_TOKENS, TraceRequest, scaled, sliced, unrounded
from predictors import PREDICTORS, predictor
from predictors.profile import load_profile, profile_names

DEFAULT_POLICY = Config().policy.name
DEFAULT_PROFILE = "llama3-70b-8xa800"
GENERATED_S = 600.0
"""How long a generated workload goes on where the command line does not say."""
SIM_ADMISSIONS = (*ADMISSIONS, CLAIRVOYANT)
"""The rules that a simulation knows: those of the gateway, and one that must know the future."""
CLAIRVOYANT_INNER = "ttft"
"""The rule behind the plan: what the plan keeps is refused only when it cannot make it any more."""
COLD = "cold"
"""The gateway's own default, which a simulation otherwise spares the first minutes: it starts from nothing."""
FINE_BLOCK_TOKENS = 16
"""vLLM's default block size, where no trace says which blocks are shared."""


@dataclass(frozen=True)
class Spec:
    """One run, as the command line states it."""

    trace: str | None = None
    format: str | None = None
    workload: str | None = None
    seconds: float | None = None
    requests: int | None = None
    prefill: int = 0
    decode: int = 0
    engine: int = 0
    profile: str = DEFAULT_PROFILE
    speed: float = 1.0
    unrounded: bool = False
    policy: str = DEFAULT_POLICY
    policy_settings: tuple[tuple[str, object], ...] = ()
    admission: str = DEFAULT_ADMISSION
    admission_settings: tuple[tuple[str, object], ...] = ()
    predictor: str = "analytic"
    slo_ttft: float | None = 30.0
    slo_tbt: float | None = 0.1
    noise: float = 0.0
    seed: int = 0
    gateways: int = 1
    view_delay_ms: float = 0.0
    no_view: bool = False
    report_delay_ms: float = 0.0
    faults: tuple[Fault, ...] = ()
    random_faults: int = 0
    returns: str | None = None
    max_visits: int = 20
    hammerers: int = 0


def add_options(parser: argparse.ArgumentParser, *, is_comparison: bool = False) -> None:
    """The flags of a run. A comparison has several of what it compares, and adds those flags itself."""
    load = parser.add_argument_group("workload")
    source = load.add_mutually_exclusive_group(required=True)
    source.add_argument("--trace", metavar="FILE", help="a published trace")
    source.add_argument("--workload", metavar="NAME", choices=SHAPES, help=f"generated: {', '.join(SHAPES)}")
    load.add_argument("--format", choices=FORMATS, help="of the trace (default: told by its first line)")
    load.add_argument("--seconds", type=float, metavar="S", help="only the first S seconds (after the speed-up)")
    load.add_argument("--unrounded", action="store_true", help="spread arrivals of one instant up to the next instant")
    load.add_argument("--requests", type=int, metavar="N", help="only the first N requests")
    pool = parser.add_argument_group("engines")
    pool.add_argument("--prefill", type=int, default=0, metavar="N", help="prefill engines")
    pool.add_argument("--decode", type=int, default=0, metavar="N", help="decode engines")
    pool.add_argument("--engine", type=int, default=0, metavar="N", help="engines that do both")
    pool.add_argument(
        "--profile",
        default=DEFAULT_PROFILE,
        metavar="NAME|FILE",
        help=f"{', '.join(profile_names())} (default {DEFAULT_PROFILE})",
    )
    pool.add_argument("--noise", type=float, default=0.0, metavar="SIGMA", help="lognormal noise on prefill times")
    goal = parser.add_argument_group("objective")
    goal.add_argument("--slo-ttft", type=float, default=30.0, metavar="S", help="seconds, 0 for none (default 30)")
    goal.add_argument("--slo-tbt", type=float, default=0.1, metavar="S", help="seconds, 0 for none (default 0.1)")
    goal.add_argument(
        "--predictor",
        default="analytic",
        choices=(*PREDICTORS, COLD),
        help=f"(default analytic: the profile; {COLD}: online with no profile at all)",
    )
    for kind in ("policy", "admission"):
        goal.add_argument(
            f"--{kind}-set", metavar="KEY=VALUE", action="append", default=[], help=f"a setting of the {kind}"
        )
    trouble = parser.add_argument_group("trouble")
    trouble.add_argument("--gateways", type=int, default=1, metavar="N", help="gateways that share the requests")
    trouble.add_argument("--view-delay-ms", type=float, default=0.0, metavar="D", help="until one knows of another's")
    trouble.add_argument("--no-view", action="store_true", help="gateways do not tell each other what they do")
    trouble.add_argument("--report-delay-ms", type=float, default=0.0, metavar="D", help="age of reports when read")
    trouble.add_argument(
        "--fault", action="append", default=[], metavar="KIND:ENGINE@START+SECONDS[xFACTOR]", help="repeatable"
    )
    trouble.add_argument("--random-faults", type=int, default=0, metavar="N", help="drawn from the seed")
    back = parser.add_argument_group("clients that come back")
    back.add_argument("--returns", choices=[str(m) for m in Manner], help="what the refused do (default: go away)")
    back.add_argument(
        "--max-visits", type=int, default=Spec.max_visits, metavar="N", help="then they give up (default %(default)s)"
    )
    back.add_argument("--hammerers", type=int, default=0, metavar="N", help="more clients, who ask each 100 ms")
    if not is_comparison:
        load.add_argument("--speed", type=float, default=1.0, metavar="X", help="times as fast (default 1)")
        goal.add_argument("--policy", default=DEFAULT_POLICY, metavar="NAME", help=f"{', '.join(POLICIES)}")
        goal.add_argument("--admission", default=DEFAULT_ADMISSION, metavar="NAME", help=f"{', '.join(SIM_ADMISSIONS)}")
        parser.add_argument("--seed", type=int, default=0, metavar="N")


def spec_of(flags: argparse.Namespace, **changes: object) -> Spec:
    """The run that the flags, with these changes, ask for. Raises ConfigError."""
    values = {name: getattr(flags, name) for name in Spec.__dataclass_fields__ if hasattr(flags, name)}
    values |= {
        "policy_settings": settings_of(flags.policy_set),
        "admission_settings": settings_of(flags.admission_set),
        "slo_ttft": flags.slo_ttft or None,
        "slo_tbt": flags.slo_tbt or None,
        "faults": tuple(parse_fault(text) for text in flags.fault),
    }
    return Spec(**(values | changes))


def settings_of(words: Iterable[str]) -> tuple[tuple[str, object], ...]:
    """`KEY=VALUE` words; a value that is no JSON is text. Raises ConfigError."""
    settings: list[tuple[str, object]] = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"{word!r} is not KEY=VALUE")
        try:
            settings.append((key, json.loads(value)))
        except ValueError:
            settings.append((key, value))
    return tuple(settings)


def run_spec(spec: Spec) -> Run:
    """Runs it; the clairvoyant rule runs it several times. Raises ConfigError, TraceError, WorkloadError."""
    workload, block_tokens = workload_of(spec)
    if spec.admission == CLAIRVOYANT:
        inner = replace(spec, admission=CLAIRVOYANT_INNER)
        return search(plan_of(inner, block_tokens), workload)
    plan = plan_of(spec, block_tokens)
    if spec.hammerers:
        workload, asked = tee(workload)
        drawn = random.Random(f"hammerers {spec.seed}").sample(list(asked), spec.hammerers)
        plan = replace(plan, hammerers=tuple(drawn))
    return simulate(plan, workload)


def plan_of(spec: Spec, block_tokens: int) -> Plan:
    """The settings of the run. Raises ConfigError."""
    profile = load_profile(spec.profile)
    fleet = Fleet(
        profile=profile,
        prefill=spec.prefill,
        decode=spec.decode,
        both=spec.engine,
        noise_sigma=spec.noise,
        block_tokens=block_tokens,
    )
    return Plan(
        fleet=fleet,
        policy=plug_in("policy", POLICIES, spec.policy, dict(spec.policy_settings)),
        admission=plug_in("admission", ADMISSIONS, spec.admission, dict(spec.admission_settings)),
        predictor=predictor("online" if spec.predictor == COLD else spec.predictor, **_predictor_settings(spec)),
        slo=Slo(ttft_s=spec.slo_ttft, tbt_s=spec.slo_tbt),
        seed=spec.seed,
        gateways=spec.gateways,
        view_delay_s=None if spec.no_view else spec.view_delay_ms / 1e3,
        report_delay_s=spec.report_delay_ms / 1e3,
        returning=None if spec.returns is None else Returning(Manner(spec.returns), spec.max_visits),
        faults=(
            *spec.faults,
            *draw_faults(spec.random_faults, fleet.engine_ids, span_s=3600 / spec.speed, seed=spec.seed),
        ),
    )


def _predictor_settings(spec: Spec) -> Mapping[str, object]:
    if spec.predictor == "online":
        return {"base": {"name": "analytic", "profile": spec.profile}}
    return {"profile": spec.profile} if spec.predictor == "analytic" else {}


def workload_of(spec: Spec) -> tuple[Iterator[TraceRequest], int]:
    """The requests of the run, and the block size of its engines, tokens. Raises TraceError, WorkloadError."""
    if spec.workload is not None:
        source = generate(spec.workload, seed=spec.seed)
    else:
        assert spec.trace is not None, "argparse asks for one of them"
        source = read_trace(Path(spec.trace), spec.format)
    is_endless = spec.workload is not None and spec.seconds is None and spec.requests is None
    seconds = GENERATED_S if is_endless else spec.seconds
    source = unrounded(source) if spec.unrounded else source
    requests = sliced(scaled(source, speed=spec.speed), seconds=seconds, count=spec.requests)
    first = list(islice(requests, 1))
    knows_blocks = bool(first) and first[0].block_ids is not None
    return chain(first, requests), BLOCK_TOKENS if knows_blocks else FINE_BLOCK_TOKENS
