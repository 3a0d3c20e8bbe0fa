"""`sluice fit`: a profile from measurements, of a file or of a live engine that is measured now."""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import aiohttp

from gateway.core.errors import ConfigError
from gateway.core.types import Role
from loadtest.arguments import header, positive, positive_int, url
from loadtest.probe import Probe
from loadtest.sweep import Sweep, SweepLimits, Swept
from predictors.fit import Capacity, fit_decode, fit_hand_off, fit_profile
from predictors.measurements import Measurements, parse_measurements
from predictors.profile import WEAK_PRIOR, Quantity, parse_profile

BAR_CHARACTERS = 24
IDLE_CONNECTION_S = 3.0
"""Below the 5 s after which vLLM's server closes an idle connection."""
MIN_S_PER_TOKEN = 1e-12
"""A hand-off whose time does not grow with its length is as good as free."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
ASSUMED = "Assumed, not measured: an accelerator with an 8B model."


def main(words: Sequence[str]) -> int:
    """Prints or writes the profile; returns 0. Raises GatewayError: ConfigError where the user is at fault."""
    flags = _parser().parse_args(words)
    if NAME.fullmatch(flags.name) is None:
        raise ConfigError(f"--name: must be letters, digits, dots and dashes, not {flags.name!r}")
    if flags.measurements is not None:
        if flags.decode_engine or flags.keep_measurements:
            raise ConfigError("--decode-engine and --keep-measurements go with --engine, not with --measurements")
        measured = _read(flags.measurements)
        swept, how = None, f"From {flags.measurements.name}."
    else:
        swept = asyncio.run(_sweep(flags))
        measured = swept.measurements
        how = "Measured by `sluice fit --engine` on a live engine."
        if flags.keep_measurements is not None:
            _write(flags.keep_measurements, measured.lines())
    text = _profile(flags, measured, swept, how)
    parse_profile(text, where=flags.name)
    if flags.out is None:
        print(text.decode(), end="")
    else:
        _write(flags.out, text)
    return 0


async def _sweep(flags: argparse.Namespace) -> Swept:
    limits = SweepLimits(
        seconds=flags.seconds,
        max_batch=flags.max_batch,
        max_prompt_tokens=flags.max_prompt_tokens,
        is_busy_allowed=flags.even_if_busy,
    )
    progress = Progress(sys.stderr)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_CONNECTION_S)
    timeout = aiohttp.ClientTimeout(total=flags.seconds)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        role = Role.BOTH if flags.decode_engine is None else Role.PREFILL
        prefill = Probe(session, flags.engine, role=role, headers=flags.header)
        decode = None
        if flags.decode_engine is not None:
            decode = Probe(session, flags.decode_engine, role=Role.DECODE, headers=flags.header)
        try:
            return await Sweep(prefill, decode, limits, random.Random(), progress.tell).run(flags.model)
        finally:
            progress.end()


class Progress:
    """A bar on a terminal; elsewhere nothing."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty()

    def tell(self, done_ratio: float, what: str) -> None:
        """So much is done, and this is next."""
        if self._is_terminal:
            full = round(BAR_CHARACTERS * min(1.0, done_ratio))
            bar = "#" * full + "." * (BAR_CHARACTERS - full)
            print(f"\r\x1b[K[{bar}] {done_ratio:4.0%} {what}", end="", file=self._stream, flush=True)

    def end(self) -> None:
        """Leaves the line."""
        if self._is_terminal:
            print("\r\x1b[K", end="", file=self._stream, flush=True)


# ---- the profile -----------------------------------------------------------------------------------------------------


def _profile(flags: argparse.Namespace, measured: Measurements, swept: Swept | None, how: str) -> bytes:
    capacity = _capacity(flags, measured, None if swept is None else swept.kv_capacity_tokens, how)
    summary = f"{how} {len(measured.prefills)} prefills, {len(measured.steps)} decode steps"
    summary += f", {len(measured.hand_offs)} hand-offs."
    if swept is not None:
        summary = f"Model {swept.model}. {summary}"
    return fit_profile(
        flags.name, measured.prefills, measured.steps, capacity, summary=f"{flags.note} {summary}".strip(), how=how
    )


def _capacity(flags: argparse.Namespace, measured: Measurements, reported_tokens: int | None, how: str) -> Capacity:
    """Sizes as the flags say, else as the engine reported, else assumed; the link as measured, else assumed."""
    if flags.kv_capacity_tokens is not None:
        tokens = Quantity(flags.kv_capacity_tokens, "Stated by --kv-capacity-tokens.")
    elif reported_tokens is not None:
        tokens = Quantity(reported_tokens, "Reported by the engine: KV blocks x block size.")
    else:
        tokens = Quantity(WEAK_PRIOR.kv_capacity_tokens, ASSUMED)
    kv_bytes = Quantity(WEAK_PRIOR.kv_bytes_per_token, ASSUMED)
    if flags.kv_bytes_per_token is not None:
        kv_bytes = Quantity(flags.kv_bytes_per_token, "Stated by --kv-bytes-per-token.")
    link_base_s, link_rate = _link(measured, kv_bytes.value, how)
    return Capacity(
        kv_bytes_per_token=kv_bytes,
        kv_capacity_tokens=tokens,
        prefix_cache_tokens=tokens,
        link_base_s=link_base_s,
        link_bytes_per_s=link_rate,
    )


def _link(measured: Measurements, kv_bytes_per_token: float, how: str) -> tuple[Quantity, Quantity]:
    """What a hand-off costs: start-up time and bytes per second."""
    if not measured.hand_offs:
        return Quantity(WEAK_PRIOR.link_base_s, ASSUMED), Quantity(WEAK_PRIOR.link_bytes_per_s, ASSUMED)
    fit = fit_hand_off(measured.hand_offs, fit_decode(measured.steps))
    base_s, s_per_token = fit.coefficients
    source = f"{fit.source} {how}"
    rate = kv_bytes_per_token / max(s_per_token, MIN_S_PER_TOKEN)
    return Quantity(base_s, source), Quantity(rate, f"{source} Seconds per token measured, times kv_bytes_per_token.")


# ---- files -----------------------------------------------------------------------------------------------------------


def _read(path: Path) -> Measurements:
    try:
        with path.open("rb") as lines:
            return parse_measurements(lines, where=path.name)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def _write(path: Path, text: bytes) -> None:
    try:
        path.write_bytes(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sluice fit", description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--measurements", type=Path, metavar="FILE", help="JSON lines of predictors/measurements.py")
    source.add_argument("--engine", type=url, metavar="URL", help="a live engine, measured now")
    parser.add_argument("--decode-engine", type=url, metavar="URL", help="where --engine hands off to: measured too")
    parser.add_argument("--name", default="fitted", help="of the profile (default: fitted)")
    parser.add_argument("--note", default="", help="first words of the profile's summary: which hardware, which flags")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the profile there (default: standard output)")
    parser.add_argument("--keep-measurements", type=Path, metavar="FILE", help="write what was measured there, too")
    parser.add_argument("--seconds", type=positive, default=120.0, help="how long to measure at most (default: 120)")
    parser.add_argument("--max-batch", type=positive_int, default=8, help="requests at once at most (default: 8)")
    parser.add_argument("--max-prompt-tokens", type=positive_int, help="default: the model's longest context")
    parser.add_argument("--model", metavar="NAME", help="what to ask for (default: the engine's first model)")
    parser.add_argument("--header", type=header, action="append", default=[], metavar="NAME:VALUE", help="sent along")
    parser.add_argument("--even-if-busy", action="store_true", help="measure although the engine serves others")
    parser.add_argument("--kv-bytes-per-token", type=positive, help="stated in the profile; timing cannot tell it")
    parser.add_argument("--kv-capacity-tokens", type=positive_int, help="default: what the engine reports")
    return parser
