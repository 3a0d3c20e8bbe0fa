"""What goes wrong during a simulation, and when: written by hand, or drawn from a seed."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from gateway.core.errors import ConfigError


class FaultKind(StrEnum):
    """What can be wrong with an engine or its port."""

    DIES = "dies"
    """It loses every request and its memory, and comes back empty after the duration."""
    SLOWS = "slows"
    """Its steps take `factor` times as long."""
    LIES = "lies"
    """It reports `factor` times its load."""
    SILENT = "silent"
    """It sends no reports."""
    LINK_SLOWS = "link-slows"
    """Transfers from and to it take `factor` times as long."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault of one engine."""

    kind: FaultKind
    engine_id: str
    at_s: float
    """From the start of the run, >= 0."""
    duration_s: float
    """> 0."""
    factor: float = 2.0
    """>= 0 for a lie, > 0 for a slowdown; no meaning for the others."""

    def __post_init__(self) -> None:
        least = 0.0 if self.kind is FaultKind.LIES else 1e-3
        if not (0 <= self.at_s < math.inf and 0 < self.duration_s < math.inf and least <= self.factor <= 1e3):
            raise ConfigError(f"fault: {self} has an impossible time, duration or factor")


_FORM = re.compile(r"(?P<kind>[a-z-]+):(?P<engine>[^@]+)@(?P<at>[\d.]+)\+(?P<duration>[\d.]+)(x(?P<factor>[\d.]+))?")


def parse_fault(text: str) -> Fault:
    """The fault that `KIND:ENGINE@START+DURATION[xFACTOR]` names, for example `slows:p3@600+120x2`. ConfigError."""
    match = _FORM.fullmatch(text)
    kinds = [str(kind) for kind in FaultKind]
    if match is None or match["kind"] not in kinds:
        raise ConfigError(f"fault: {text!r} is not KIND:ENGINE@START+DURATION[xFACTOR]; kinds: {', '.join(kinds)}")
    try:
        at_s, duration_s, factor = float(match["at"]), float(match["duration"]), float(match["factor"] or 2.0)
    except ValueError as error:
        raise ConfigError(f"fault: {text!r}: {error}") from None
    return Fault(FaultKind(match["kind"]), match["engine"], at_s, duration_s, factor)


def draw_faults(count: int, engine_ids: Sequence[str], *, span_s: float, seed: int) -> tuple[Fault, ...]:
    """`count` random faults within `span_s`, each 10 to 120 s long; the same seed gives the same faults."""
    rng = random.Random(f"faults {seed}")
    faults = []
    for _ in range(count):
        kind = rng.choice(list(FaultKind))
        factor = rng.choice((0.0, 0.5, 3.0)) if kind is FaultKind.LIES else rng.uniform(1.5, 5.0)
        faults.append(Fault(kind, rng.choice(engine_ids), rng.uniform(0, span_s), rng.uniform(10, 120), factor))
    return tuple(sorted(faults, key=lambda fault: (fault.at_s, fault.engine_id)))
