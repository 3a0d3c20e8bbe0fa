"""How well a real prefill and decode pair is predicted: `sluice bench reality --prefill URL --decode URL`.

A seeded workload with bursts and shared prefixes is replayed through a gateway of its own whose predictor corrects a
measured profile, twice, with new token ids each time so that no cache remembers any of it. What was predicted
at each dispatch and what came of it are read from the gateway's journal: the very numbers that its decisions rest on.
The second replay beside the first is the noise floor: how far the same request is from itself on this machine.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from gateway.core.errors import GatewayError
from loadtest.arguments import positive, positive_int, url
from loadtest.client import ClientRequest, LoadClient
from loadtest.sweep import TOKEN_IDS
from predictors.score import Score, score

PREFIXES, PREFIX_TOKENS = 6, 512
SHARED_RATIO = 0.4
OWN_TOKENS, MAX_OWN_TOKENS = 500, 3500
"""Median and largest of the tokens that no other prompt has."""
OUTPUT_TOKENS = range(8, 41)
BURST_RATIO, MAX_BURST = 0.25, 5
"""Of the instants at which requests come, how many bring several at once, and how many at most."""
READY_S, POLL_S = 60.0, 0.1


@dataclass(frozen=True, slots=True)
class Item:
    """One request of the workload. No two have the same number of prompt tokens: that is how the journal names them."""

    due_s: float
    prefix: int | None
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Told:
    """What the journal tells of one request; times in seconds."""

    prompt_tokens: int
    predicted_prefill_s: float
    """Wait, fetch and prefill."""
    predicted_hand_off_s: float
    """Hand-off and the join with the decode batch."""
    predicted_tbt_s: float
    before_s: float
    """From arrival to dispatch."""
    prefill_s: float
    """From dispatch to the end of the prefill."""
    hand_off_s: float
    """From there to the first token."""
    tbt_s: float
    """Mean of the slowest 10 % of token gaps."""

    @property
    def predicted_ttft_s(self) -> float:
        """What admission sees."""
        return self.predicted_prefill_s + self.predicted_hand_off_s

    @property
    def ttft_s(self) -> float:
        """From arrival at the gateway to the first token leaving it."""
        return self.before_s + self.prefill_s + self.hand_off_s


def workload(count: int, rate_per_s: float, seed: int) -> list[Item]:
    """So many requests, on average `rate_per_s` of them per second, in single arrivals and bursts."""
    rng = random.Random(seed)
    mean_burst = 1.0 + BURST_RATIO * ((2 + MAX_BURST) / 2 - 1.0)
    due_s, taken, items = 0.0, set[int](), list[Item]()
    while len(items) < count:
        due_s += rng.expovariate(rate_per_s / mean_burst)
        for _ in range(rng.randint(2, MAX_BURST) if rng.random() < BURST_RATIO else 1):
            prefix = rng.randrange(PREFIXES) if rng.random() < SHARED_RATIO else None
            tokens = min(MAX_OWN_TOKENS, int(rng.lognormvariate(np.log(OWN_TOKENS), 0.9)) + 16)
            tokens += 0 if prefix is None else PREFIX_TOKENS
            while tokens in taken:
                tokens += 1
            taken.add(tokens)
            items.append(Item(due_s, prefix, tokens, rng.choice(OUTPUT_TOKENS)))
    return items[:count]


def requests(items: Iterable[Item], model: str, rng: random.Random) -> list[ClientRequest]:
    """The items as streamed completions of token ids drawn from `rng`."""
    prefixes = [rng.choices(TOKEN_IDS, k=PREFIX_TOKENS) for _ in range(PREFIXES)]
    made = []
    for item in items:
        shared = [] if item.prefix is None else prefixes[item.prefix]
        body = {
            "model": model,
            "prompt": shared + rng.choices(TOKEN_IDS, k=item.prompt_tokens - len(shared)),
            "max_tokens": item.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        made.append(ClientRequest(item.due_s, msgspec.json.encode(body), path="/v1/completions"))
    return made


# ---- the journal -----------------------------------------------------------------------------------------------------


def read_journal(lines: Iterable[bytes]) -> list[Told]:
    """The requests that were answered at the first attempt, in the order in which they were dispatched."""
    decided: dict[str, tuple[dict[str, object], dict[str, float], float]] = {}
    events: dict[str, dict[str, tuple[float, dict[str, object]]]] = {}
    for line in lines:
        row = msgspec.json.decode(line)
        if row["do"] == "decide":
            decision = row["decision"]
            if decision["type"] == "Dispatch" and decision["attempt"] == 1:
                decided[decision["request_id"]] = row["request"], decision["estimate"], row["at"]
        elif row["do"] == "apply" and "request_id" in row["event"]:
            event = row["event"]
            events.setdefault(event["request_id"], {})[event["type"]] = (row["at"], event)
    return [
        _told(*decided[request_id], events[request_id])
        for request_id in decided
        if {"PrefillDone", "FirstToken", "Finished"} <= events.get(request_id, {}).keys()
        and events[request_id]["Finished"][1]["tbt_s"] is not None
    ]


def _told(
    request: dict[str, object],
    estimate: dict[str, float],
    sent_at: float,
    events: dict[str, tuple[float, dict[str, object]]],
) -> Told:
    prefilled_at, first_token_at = events["PrefillDone"][0], events["FirstToken"][0]
    return Told(
        prompt_tokens=int(str(request["prompt_tokens"])),
        predicted_prefill_s=estimate["wait_s"] + estimate["fetch_s"] + estimate["prefill_s"],
        predicted_hand_off_s=estimate["hand_off_s"] + estimate["join_s"],
        predicted_tbt_s=estimate["tbt_s"],
        before_s=sent_at - float(str(request["arrived_at"])),
        prefill_s=prefilled_at - sent_at,
        hand_off_s=first_token_at - prefilled_at,
        tbt_s=float(str(events["Finished"][1]["tbt_s"])),
    )


# ---- the table -------------------------------------------------------------------------------------------------------

ROWS = (
    ("TTFT", "predicted_ttft_s", "ttft_s"),
    ("  wait and prefill", "predicted_prefill_s", "prefill_s"),
    ("  hand-off and join", "predicted_hand_off_s", "hand_off_s"),
    ("TBT", "predicted_tbt_s", "tbt_s"),
)


def column(told: Sequence[Told], name: str) -> NDArray[np.float64]:
    """One field of all, shape (requests,)."""
    return np.array([getattr(each, name) for each in told], dtype=float)


def scores(told: Sequence[Told]) -> dict[str, Score]:
    """Each row's measures."""
    return {name: score(column(told, predicted), column(told, actual)) for name, predicted, actual in ROWS}


def noise_floor(one: Sequence[Told], other: Sequence[Told]) -> dict[str, float]:
    """Median of |other - one| / one per row, over the requests that both replays answered."""
    twin = {each.prompt_tokens: each for each in other}
    both = [(each, twin[each.prompt_tokens]) for each in one if each.prompt_tokens in twin]
    return {
        name: _median_error(column([b for _, b in both], actual), column([a for a, _ in both], actual))
        for name, _, actual in ROWS
    }


def _median_error(predicted: ArrayLike, actual: ArrayLike) -> float:
    return score(predicted, actual).p50_error_ratio


def table(replays: Sequence[Sequence[Told]], skip: int) -> str:
    """Errors after the first `skip` requests of each replay, and the noise floor between the first two."""
    head = f"{'':<22}{'median time':>12}{'median |error|':>16}{'p95 |error|':>13}{'bias':>9}{'noise floor':>13}"
    floor = noise_floor(replays[0][skip:], replays[1][skip:])
    lines = []
    for number, told in enumerate(replays, start=1):
        lines += ["", f"replay {number}: requests {skip + 1} to {len(told)}", head]
        for (name, _, actual), measured in zip(ROWS, scores(told[skip:]).values(), strict=True):
            lines.append(
                f"{name:<22}{np.median(column(told[skip:], actual)):>10.3f} s{measured.p50_error_ratio:>16.1%}"
                f"{measured.p95_error_ratio:>13.1%}{measured.bias_ratio:>+9.1%}{floor[name]:>13.1%}"
            )
    return "\n".join(lines)


# ---- the run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Run:
    """What is replayed against which engines."""

    prefill_url: str
    decode_url: str
    profile: str
    """Name or path of the profile that the predictor corrects."""
    model: str
    request_count: int = 400
    rate_per_s: float = 2.0
    seed: int = 1


async def replay_once(run: Run, replay_number: int, directory: Path) -> list[Told]:
    """What the journal of one replay tells. Raises GatewayError when the gateway fails or a request does."""
    journal = directory / f"journal-{replay_number}.jsonl"
    items = workload(run.request_count, run.rate_per_s, run.seed)
    async with _gateway(run, journal, directory) as base_url, LoadClient(base_url, keep_text=False) as client:
        # Ids that nobody drew before: an engine would remember those of an earlier run, and the gateway would not.
        results = await client.run(requests(items, run.model, random.Random()))
    failed = [result for result in results if result.error is not None]
    if failed:
        raise GatewayError(f"{len(failed)} requests failed, the first: {failed[0].error} {failed[0].detail}")
    with journal.open("rb") as lines:
        return read_journal(lines)


@asynccontextmanager
async def _gateway(run: Run, journal: Path, directory: Path) -> AsyncIterator[str]:
    """The base URL of a gateway process in front of the pair, ready to serve; ended afterwards."""
    config = directory / "sluice.toml"
    config.write_text(_config(run))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["serve", "--config", str(config), "--port", str(port), "--journal", str(journal)]
    with (directory / "gateway.log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, str(Path(__file__).with_name("leash.py")), sys.executable, "-m", "gateway", *words),
            stdin=asyncio.subprocess.PIPE,
            stdout=log,
            stderr=log,
        )
    try:
        base_url = f"http://127.0.0.1:{port}"
        await asyncio.wait_for(_ready(base_url), READY_S)
        yield base_url
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


def _config(run: Run) -> str:
    """The gateway's settings: the pair, and a predictor that corrects the profile."""
    quoted = msgspec.json.encode(run.profile).decode()
    return (
        f'[[engines]]\nurl = "{run.prefill_url}"\nrole = "prefill"\n'
        f'[[engines]]\nurl = "{run.decode_url}"\nrole = "decode"\n'
        f'[predictor]\nname = "online"\n[predictor.settings]\nbase = {{ name = "analytic", profile = {quoted} }}\n'
    )


async def _ready(base_url: str) -> None:
    async with aiohttp.ClientSession() as session:
        while True:
            try:
                async with session.get(f"{base_url}/ready") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(POLL_S)


def main(words: Sequence[str]) -> int:
    """Prints the table; returns 0. Raises GatewayError."""
    flags = _parser().parse_args(words)
    run = Run(flags.prefill, flags.decode, flags.profile, flags.model, flags.requests, flags.rate, flags.seed)
    print(f"load average at the start: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", file=sys.stderr)
    with tempfile.TemporaryDirectory() as temporary:
        directory = flags.keep or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        replays = [asyncio.run(replay_once(run, number, directory)) for number in (1, 2)]
    print(table(replays, flags.skip))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sluice bench reality", description=__doc__)
    parser.add_argument("--prefill", type=url, required=True, metavar="URL", help="a live prefill engine")
    parser.add_argument("--decode", type=url, required=True, metavar="URL", help="the decode engine it hands off to")
    parser.add_argument("--profile", required=True, metavar="NAME|FILE", help="of these engines: sluice fit")
    parser.add_argument("--model", required=True, help="what to ask for")
    parser.add_argument("--requests", type=positive_int, default=400, help="per replay (default: 400)")
    parser.add_argument("--skip", type=positive_int, default=200, help="learnt from, not scored (default: 200)")
    parser.add_argument("--rate", type=positive, default=2.0, help="requests per second (default: 2)")
    parser.add_argument("--seed", type=int, default=1, help="of the workload")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave journals and logs there")
    return parser
