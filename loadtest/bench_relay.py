"""What the gateway costs: processor time per request and per streamed token, and the time it adds to the first token.

Emulated engines (loadtest/lean_engine.py) and an open-loop client (loadtest/lean_client.py) run as processes of their
own; the gateway is `sluice serve` with routing, index, prediction, admission and a real tokenizer switched on. Its cost
is what the operating system accounts to its process, its threads and its children. Rounds of all proxies are
interleaved, case by case, so that a busy machine is unfair to all of them alike; `direct` asks the engines themselves.

    whole 0.4K, whole 200K    answers in one piece to prompts of that size; the long ones are conversations that go on:
                              each request of one has all of the one before, and a new turn of 1 KB
    stream 0.4K               100 tokens, one per engine step of 10 ms
    pd ...                    the same through a prefill and a decode engine: two calls per request

`--telemetry` adds two gateways: one that tells nobody anything (no spans, no `/metrics`, no page, no log lines), and
one that tells all (spans of a tenth of the requests to a collector, a log line per request, `/metrics` scraped).

Any other proxy can be measured in the same run: start it in front of the engines' addresses, which `--port N` fixes
(N, N+1 do both; N+2, N+3 prefill; N+4, N+5 decode), and name it as `--peer NAME=URL@PID`. `--start NAME` starts one of
loadtest/peers.py, whose docstring shows the commands; `make bench-peers` installs and starts all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from gateway.core.errors import ConfigError, GatewayError
from gateway.core.types import Role
from loadtest.arguments import positive, positive_int
from loadtest.bench_tokens import made_up_text, made_up_words, save_model
from loadtest.lean_client import Job, Took
from loadtest.lean_engine import MODEL
from loadtest.peers import PEERS, Upstreams, missing
from loadtest.processes import await_answer, cpu_s, free_port, python, started, told

DIRECT = "direct"
SLUICE = "sluice"
UNTOKENISED = "sluice, no tokenizer"
SILENT = "sluice, telemetry off"
TELLING = "sluice, telemetry on"
SAMPLE_RATIO = 0.1
SCRAPES_PER_S = 1.0
SMALL_CHARS, LARGE_CHARS = 250, 200_000
"""Of the prompt; with the rest of the body 0.4 KB and 200 KB."""
TURN_CHARS = 1_000
CONVERSATIONS = 4
TOKENS = 100
"""Streamed per request."""
TRAINING_CHARS = 1_000_000
KNOWN_WORDS = 5_000
ROLES = (Role.BOTH, Role.BOTH, Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE)


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of request."""

    name: str
    is_stream: bool
    is_long: bool
    is_hand_off: bool
    rate_per_s: float
    """Of requests, at `--load 1`."""

    @property
    def tokens(self) -> int:
        return TOKENS if self.is_stream else 8

    @property
    def per(self) -> float:
        """What the cost is divided by for one request: for streams hundreds of tokens."""
        return self.tokens / 100 if self.is_stream else 1.0


CASES = (
    Case("whole 0.4K", is_stream=False, is_long=False, is_hand_off=False, rate_per_s=200),
    Case("whole 200K", is_stream=False, is_long=True, is_hand_off=False, rate_per_s=60),
    Case("stream 0.4K", is_stream=True, is_long=False, is_hand_off=False, rate_per_s=50),
    Case("pd whole 0.4K", is_stream=False, is_long=False, is_hand_off=True, rate_per_s=100),
    Case("pd whole 200K", is_stream=False, is_long=True, is_hand_off=True, rate_per_s=40),
    Case("pd stream 0.4K", is_stream=True, is_long=False, is_hand_off=True, rate_per_s=50),
)


@dataclass(frozen=True, slots=True)
class Proxy:
    """Something that is asked."""

    name: str
    urls: tuple[str, ...]
    """Several only for `direct`: the engines, asked in turn of rounds."""
    pid: int | None
    rate_ratio: float = 1.0


@dataclass(frozen=True, slots=True)
class Variant:
    """A gateway that is measured."""

    name: str
    tokenizer: Path | None
    """None: lengths are estimated and nothing is indexed."""
    settings: str = ""
    """TOML tables beside those that every gateway of the bench has."""
    log_level: str = "warning"
    is_scraped: bool = False
    """Whether its `/metrics` are read each second."""

    @property
    def file_name(self) -> str:
        return self.name.replace(", ", "-").replace(" ", "-")


@dataclass(slots=True)
class Sample:
    """All rounds of one case through one proxy."""

    cpu_us: list[float] = field(default_factory=list)
    """Per request, or per 100 tokens of a stream, each round."""
    first_s: list[float] = field(default_factory=list)
    failed: int = 0
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Figure:
    """What one case through one proxy came to."""

    case: str
    proxy: str
    cpu_us: float | None
    """Processor time, microseconds, per request or per 100 tokens of a stream; None without a process of its own."""
    first_p50_ms: float
    first_p99_ms: float
    added_p50_ms: float
    """First token, or whole answer, over asking the engine directly at the same rate."""
    added_p99_ms: float
    requests: int
    failed: int


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how hard."""

    rounds: int
    round_s: float
    load: float
    seed: int


@dataclass(frozen=True, slots=True)
class Asked:
    """What is measured beside Sluice itself."""

    start: Sequence[str] = ()
    """Names of peers that are started."""
    given: Sequence[Proxy] = ()
    """Proxies that run already; asked without hand-off only."""
    telemetry: bool = False
    """Gateways that tell nothing and all."""


class Client:
    """The client's process."""

    def __init__(self, process: Any, bodies: dict[str, Path]) -> None:
        self._process = process
        self._bodies = bodies
        self._sent = 0

    def run(self, case: Case, url: str, count: int, rate_per_s: float, seed: int) -> Took:
        """Sends so many requests of that case, none with a body that was sent before. Raises GatewayError."""
        bodies = str(self._bodies[case.name])
        job = Job(url=url, count=count, rate_per_s=rate_per_s, bodies=bodies, first=self._sent, seed=seed)
        self._sent += count
        self._process.stdin.write(json.dumps(asdict(job)) + "\n")
        self._process.stdin.flush()
        return Took(**told(self._process))


def main(argv: Sequence[str]) -> int:
    """Runs the bench and prints a table, or JSON with `--json`; returns 1 when requests failed through Sluice."""
    flags = _flags(argv)
    if absent := missing(flags.start):
        raise ConfigError(f"not installed: {', '.join(absent)}; `make peers` installs them")
    plan = Plan(flags.rounds, flags.round_s, flags.load, flags.seed)
    cases = [case for case in CASES if not flags.case or case.name in flags.case]
    with tempfile.TemporaryDirectory() as folder:
        asked = Asked(flags.start, flags.peer, flags.telemetry)
        figures = measure(plan, cases, asked, flags.port, Path(folder), flags.profile)
    print(json.dumps([asdict(figure) for figure in figures], indent=2) if flags.json else render(figures))
    return 1 if any(figure.failed for figure in figures if figure.proxy.startswith(SLUICE)) else 0


def _flags(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="sluice bench relay", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--rounds", type=positive_int, default=3, help="interleaved rounds per case and proxy")
    parser.add_argument("--round-s", type=positive, default=4.0, help="seconds of requests per round")
    parser.add_argument("--load", type=positive, default=1.0, help="multiplies every case's rate")
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES], help="only this; repeatable")
    parser.add_argument("--start", action="append", default=[], choices=PEERS, help="start this peer too; repeatable")
    parser.add_argument("--peer", metavar="NAME=URL@PID", type=peer, action="append", default=[], help="one that runs")
    parser.add_argument("--telemetry", action="store_true", help="also gateways with all telemetry off and on")
    parser.add_argument("--port", type=positive_int, help="first of the six ports of the engines (default: free ones)")
    parser.add_argument("--profile", metavar="FILE", help="write a cProfile of the gateway there")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args(argv)


def peer(text: str) -> Proxy:
    """The proxy that NAME=URL@PID means."""
    name, _, rest = text.partition("=")
    url, _, pid = rest.rpartition("@")
    if not (name and url.startswith("http://") and pid.isdigit()):
        raise argparse.ArgumentTypeError(f"must be NAME=http://HOST:PORT@PID, got {text!r}")
    return Proxy(name, (url.rstrip("/"),), int(pid))


# ---- what runs -------------------------------------------------------------------------------------------------------


def measure(
    plan: Plan,
    cases: Sequence[Case],
    asked: Asked,
    port: int | None,
    folder: Path,
    profile: str | None = None,
) -> list[Figure]:
    """The figures of all cases and proxies, in the order of the table."""
    model, bodies = _write_inputs(cases, folder, plan)
    figures: list[Figure] = []
    with contextlib.ExitStack() as stack:
        upstreams = _start_engines(stack, port)
        client = Client(stack.enter_context(started(python("loadtest.lean_client"), talks=True)), bodies)
        variants = [Variant(SLUICE, model), Variant(UNTOKENISED, None)]
        if asked.telemetry:
            variants += _telemetry_variants(stack, model)
        for is_hand_off in (False, True):
            group = [case for case in cases if case.is_hand_off is is_hand_off]
            if group:
                with contextlib.ExitStack() as proxies:
                    running = _start_gateways(proxies, upstreams, is_hand_off, variants, folder, profile)
                    running += _start_peers(proxies, upstreams, is_hand_off, asked.start, folder)
                    running += [] if is_hand_off else asked.given
                    figures += [figure for case in group for figure in _measure_case(client, case, running, plan)]
    return figures


def _start_engines(stack: contextlib.ExitStack, port: int | None) -> Upstreams:
    urls = []
    for number, role in enumerate(ROLES):
        words = ["--role", role, "--port", str(port + number if port else 0)]
        engine = stack.enter_context(started(python("loadtest.lean_engine", *words), talks=True))
        urls.append(f"http://127.0.0.1:{told(engine)['ports'][0]}")
    return Upstreams(tuple(urls[:2]), tuple(urls[2:4]), tuple(urls[4:]))


def _telemetry_variants(stack: contextlib.ExitStack, model: Path) -> list[Variant]:
    """A gateway that tells nothing, and one that tells all to a collector and a scraper of its own."""
    collector = stack.enter_context(started(python("loadtest.otlp_sink"), talks=True))
    endpoint = f"http://127.0.0.1:{told(collector)['port']}"
    off = "[telemetry]\nmetrics = 'off'\ndecisions = 'off'\n\n[dashboard]\naccess = 'off'"
    on = f"[telemetry]\nendpoint = '{endpoint}'\nsample_ratio = {SAMPLE_RATIO}"
    return [Variant(SILENT, model, off), Variant(TELLING, model, on, log_level="info", is_scraped=True)]


def _start_gateways(
    stack: contextlib.ExitStack,
    upstreams: Upstreams,
    is_hand_off: bool,
    variants: Sequence[Variant],
    folder: Path,
    profile: str | None,
) -> list[Proxy]:
    """`direct` first; then Sluice in each variant."""
    proxies = [Proxy(DIRECT, upstreams.decode if is_hand_off else upstreams.both, None)]
    for variant in variants:
        config = folder / f"{variant.file_name}-{is_hand_off}.toml"
        gateway_port = free_port()
        config.write_text(gateway_config(gateway_port, upstreams, is_hand_off, variant))
        command = python("gateway", "serve", "--config", str(config))
        if profile is not None and variant.name == SLUICE:
            command[1:1] = ["-m", "cProfile", "-o", f"{profile}{'.pd' if is_hand_off else ''}"]
        proxies.append(_started_proxy(stack, variant.name, command, gateway_port, folder, 1.0, "/ready"))
        if variant.is_scraped:
            stack.enter_context(scraped(proxies[-1].urls[0] + "/metrics"))
    return proxies


@contextlib.contextmanager
def scraped(url: str) -> Iterator[None]:
    """Reads that address again and again while the block runs, as a Prometheus server does."""
    is_over = threading.Event()

    def scrape() -> None:
        while not is_over.wait(1 / SCRAPES_PER_S):
            with contextlib.suppress(OSError), urlopen(url, timeout=5) as response:
                response.read()

    scraper = threading.Thread(target=scrape, daemon=True)
    scraper.start()
    try:
        yield
    finally:
        is_over.set()
        scraper.join()


def _start_peers(
    stack: contextlib.ExitStack, upstreams: Upstreams, is_hand_off: bool, start: Sequence[str], folder: Path
) -> list[Proxy]:
    """The peers of those names that can do it and answer; of the others it is said why they are left out."""
    proxies = []
    for name in start:
        peer = PEERS[name]
        make = peer.hand_off if is_hand_off else peer.command
        if make is not None:
            port = free_port()
            command = make(port, upstreams, folder)
            try:
                proxies.append(_started_proxy(stack, name, command, port, folder, peer.rate_ratio, None))
            except GatewayError as error:  # the others are still worth their time
                print(f"{name} is left out: {error.message}", file=sys.stderr)
    return proxies


def _started_proxy(
    stack: contextlib.ExitStack,
    name: str,
    command: list[str],
    port: int,
    folder: Path,
    rate_ratio: float,
    ready: str | None,
) -> Proxy:
    """A proxy that answers. Raises GatewayError when it does not."""
    log = folder / f"{name}.log"
    process = stack.enter_context(started(command, log=log))
    url = f"http://127.0.0.1:{port}"
    await_answer(url + (ready or "/v1/models"), process, log)
    return Proxy(name, (url,), process.pid, rate_ratio)


def gateway_config(port: int, upstreams: Upstreams, is_hand_off: bool, variant: Variant) -> str:
    """Settings of a gateway with everything on that the variant does not switch off."""
    roles = [(url, Role.PREFILL) for url in upstreams.prefill] + [(url, Role.DECODE) for url in upstreams.decode]
    engines = roles if is_hand_off else [(url, Role.BOTH) for url in upstreams.both]
    lines = [
        f"[server]\nport = {port}\n",
        f"[log]\nformat = 'json'\nlevel = '{variant.log_level}'\n",
        "[tokens]\nask_engine = false",
    ]
    if variant.tokenizer is not None:
        lines.append(f"tokenizer = '{variant.tokenizer}'")
    lines += [f"\n{variant.settings}"] if variant.settings else []
    lines += [f"\n[[engines]]\nurl = '{url}'\nrole = '{role}'" for url, role in engines]
    return "\n".join(lines) + "\n"


# ---- what is sent ----------------------------------------------------------------------------------------------------


def _write_inputs(cases: Sequence[Case], folder: Path, plan: Plan) -> tuple[Path, dict[str, Path]]:
    """A tokenizer's folder, and per case a file of request bodies."""
    rng = random.Random(plan.seed)
    words = made_up_words(rng, KNOWN_WORDS)
    model = folder / "model"
    model.mkdir()
    save_model(model, made_up_text(rng, words, TRAINING_CHARS))
    files = {}
    for case in cases:
        files[case.name] = folder / f"{case.name.replace(' ', '-')}.jsonl"
        lines = list(_bodies(case, rng, words))
        files[case.name].write_bytes(b"\n".join(lines))
    return model, files


def _bodies(case: Case, rng: random.Random, words: list[str]) -> Iterator[bytes]:
    """Bodies of a case: short ones all different, long ones the turns of a few conversations, taken in turn."""
    if not case.is_long:
        for _ in range(2000):
            yield _body(case, [{"role": "user", "content": made_up_text(rng, words, SMALL_CHARS)}])
        return
    conversations = [_conversation(rng, words) for _ in range(CONVERSATIONS)]
    for _ in range(50):
        for turns in conversations:
            turns += [
                {"role": "assistant", "content": made_up_text(rng, words, TURN_CHARS // 2)},
                {"role": "user", "content": made_up_text(rng, words, TURN_CHARS // 2)},
            ]
            yield _body(case, turns)


def _conversation(rng: random.Random, words: list[str]) -> list[dict[str, str]]:
    size = LARGE_CHARS // 40
    roles = ("user", "assistant")
    system = [{"role": "system", "content": made_up_text(rng, words, size)}]
    return system + [{"role": roles[n % 2], "content": made_up_text(rng, words, size)} for n in range(36)]


def _body(case: Case, messages: list[dict[str, str]]) -> bytes:
    fields = {"model": MODEL, "messages": messages, "max_tokens": case.tokens, "temperature": 0.7, "top_p": 0.95}
    return json.dumps(fields | ({"stream": True} if case.is_stream else {})).encode()


# ---- measuring -------------------------------------------------------------------------------------------------------


def _measure_case(client: Client, case: Case, proxies: Sequence[Proxy], plan: Plan) -> list[Figure]:
    samples = {proxy.name: Sample() for proxy in proxies}
    for number in range(plan.rounds):
        order = list(proxies)
        random.Random(plan.seed + number).shuffle(order)
        for proxy in order:
            print(f"{case.name}, round {number + 1} of {plan.rounds}: {proxy.name}", file=sys.stderr)
            _measure_round(client, case, proxy, samples[proxy.name], plan, number)
    direct = samples[DIRECT]
    return [_figure(case, name, sample, direct) for name, sample in samples.items()]


def _measure_round(client: Client, case: Case, proxy: Proxy, sample: Sample, plan: Plan, number: int) -> None:
    rate_per_s = case.rate_per_s * plan.load * proxy.rate_ratio
    url = proxy.urls[number % len(proxy.urls)]
    client.run(case, url, max(4, int(rate_per_s * 0.5)), rate_per_s, plan.seed)  # connections and caches fill
    before_s = cpu_s(proxy.pid) if proxy.pid is not None else 0.0
    took = client.run(case, url, max(10, int(rate_per_s * plan.round_s)), rate_per_s, plan.seed + number)
    if proxy.pid is not None and took.completed:
        sample.cpu_us.append((cpu_s(proxy.pid) - before_s) / took.completed / case.per * 1e6)
    sample.first_s += took.first_s
    sample.failed += took.failed
    sample.failures += took.failures[:1]


def _figure(case: Case, name: str, sample: Sample, direct: Sample) -> Figure:
    if sample.failures:
        print(f"{case.name}: {name}: {sample.failed} failed: {sample.failures[0]}", file=sys.stderr)
    p50_ms, p99_ms = (quantile(sample.first_s, ratio) * 1e3 for ratio in (0.5, 0.99))
    return Figure(
        case=case.name,
        proxy=name,
        cpu_us=statistics.median(sample.cpu_us) if sample.cpu_us else None,
        first_p50_ms=p50_ms,
        first_p99_ms=p99_ms,
        added_p50_ms=p50_ms - quantile(direct.first_s, 0.5) * 1e3,
        added_p99_ms=p99_ms - quantile(direct.first_s, 0.99) * 1e3,
        requests=len(sample.first_s),
        failed=sample.failed,
    )


def quantile(values: Sequence[float], ratio: float) -> float:
    """The value below which that share of them lies; NaN without any."""
    return sorted(values)[min(len(values) - 1, int(len(values) * ratio))] if values else float("nan")


def render(figures: Sequence[Figure]) -> str:
    """A table for people: a block of rows per case."""
    head = f"{'case':<16}{'through':<24}{'CPU us':>10}{'first p50 ms':>14}{'p99':>9}{'added p50':>11}{'p99':>9}"
    lines = [head + f"{'requests':>10}{'failed':>8}"]
    before = ""
    for row in figures:
        if row.case != before:
            lines.append("")
        cpu = "-" if row.cpu_us is None else f"{row.cpu_us:,.0f}"
        lines.append(
            f"{row.case if row.case != before else '':<16}{row.proxy:<24}{cpu:>10}{row.first_p50_ms:>14.2f}"
            f"{row.first_p99_ms:>9.2f}{row.added_p50_ms:>11.2f}{row.added_p99_ms:>9.2f}{row.requests:>10}{row.failed:>8}"
        )
        before = row.case
    notes = (
        "CPU us: processor time of the proxy per request; of streams, per 100 tokens. First: time to the first token,"
    )
    return "\n".join((*lines, "", notes, "or to the whole answer; added: over asking the engine directly."))
