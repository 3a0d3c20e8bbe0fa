"""What was measured of an engine, as JSON lines, one measurement each.

A prefill on an idle engine, from the call to its answer:
    {"prompt_tokens": 4096, "cached_tokens": 0, "elapsed_s": 0.41}
A decode step:
    {"batch": 8, "kv_tokens": 32768, "step_s": 0.021}
A hand-off to an idle decode engine, from the call there to its first token, which includes a decode step:
    {"prompt_tokens": 4096, "hand_off_s": 0.03}
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from gateway.core.errors import ConfigError

MAX_LINE_BYTES = 1 << 16


class FitError(ConfigError):
    """The measurements cannot be read, or no profile follows from them."""


class Prefill(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One prefill on an idle engine."""

    prompt_tokens: int
    cached_tokens: int
    elapsed_s: float


class DecodeStep(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One decode step (or the mean of some with the same batch)."""

    batch: int
    kv_tokens: int
    step_s: float


class HandOff(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One hand-off of a prompt's KV to an idle decode engine."""

    prompt_tokens: int
    hand_off_s: float


@dataclass(frozen=True, slots=True)
class Measurements:
    """Everything measured, each kind in order."""

    prefills: tuple[Prefill, ...] = ()
    steps: tuple[DecodeStep, ...] = ()
    hand_offs: tuple[HandOff, ...] = ()

    def lines(self) -> bytes:
        """One JSON line per measurement, for `parse_measurements`."""
        rows = (*self.prefills, *self.steps, *self.hand_offs)
        return b"".join(msgspec.json.encode(row) + b"\n" for row in rows)


def parse_measurements(lines: Iterable[bytes], *, where: str = "measurements") -> Measurements:
    """The measurements of JSON lines; blank lines are skipped. FitError names the line."""
    rows: list[Prefill | DecodeStep | HandOff] = []
    for number, line in enumerate(lines, start=1):
        if len(line) > MAX_LINE_BYTES:
            raise FitError(f"{where}:{number}: line of over {MAX_LINE_BYTES} bytes")
        if not line.strip():
            continue
        try:
            rows.append(_checked(msgspec.json.decode(line, type=dict[str, object])))
        except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
            raise FitError(f"{where}:{number}: {error}") from error
    return Measurements(
        prefills=tuple(row for row in rows if isinstance(row, Prefill)),
        steps=tuple(row for row in rows if isinstance(row, DecodeStep)),
        hand_offs=tuple(row for row in rows if isinstance(row, HandOff)),
    )


def _checked(raw: dict[str, object]) -> Prefill | DecodeStep | HandOff:
    """The measurement, of the kind that its keys tell. ValueError when it cannot be one."""
    if "step_s" in raw:
        return _check_step(msgspec.convert(raw, DecodeStep))
    if "hand_off_s" in raw:
        return _check_hand_off(msgspec.convert(raw, HandOff))
    return _check_prefill(msgspec.convert(raw, Prefill))


def _check_prefill(prefill: Prefill) -> Prefill:
    if not 0 <= prefill.cached_tokens < prefill.prompt_tokens:
        raise ValueError("must hold 0 <= cached_tokens < prompt_tokens")
    if not 0.0 < prefill.elapsed_s < float("inf"):
        raise ValueError("elapsed_s must be finite and > 0")
    return prefill


def _check_step(step: DecodeStep) -> DecodeStep:
    if step.batch < 1 or step.kv_tokens < 0:
        raise ValueError("must hold batch >= 1 and kv_tokens >= 0")
    if not 0.0 < step.step_s < float("inf"):
        raise ValueError("step_s must be finite and > 0")
    return step


def _check_hand_off(hand_off: HandOff) -> HandOff:
    if hand_off.prompt_tokens < 1:
        raise ValueError("must hold prompt_tokens >= 1")
    if not 0.0 < hand_off.hand_off_s < float("inf"):
        raise ValueError("hand_off_s must be finite and > 0")
    return hand_off
