"""W3C trace context: the ids that join a request's spans here with its client's and its engines'.

Ids must exist when the legs are sent, long before a span is made of them, and most requests are not sampled: so they
are plain numbers, drawn here, and OpenTelemetry is only asked to export. `tests/test_trace_context.py` holds both
halves against OpenTelemetry's own propagator and sampler.

Source: W3C Trace Context, https://www.w3.org/TR/trace-context/ section 3.2.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

TRACEPARENT = "traceparent"
TRACESTATE = "tracestate"
MAX_TRACESTATE_CHARS = 512
"""What must be propagated at the least (section 3.3.1.5); a longer one is cut off whole."""

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED = 1


@dataclass(frozen=True, slots=True)
class Parent:
    """Who called: a span outside."""

    trace_id: int
    span_id: int
    is_sampled: bool
    tracestate: str = ""


@dataclass(frozen=True, slots=True)
class Trace:
    """One request's place in a trace."""

    trace_id: int
    span_id: int
    """Of the request's own span."""
    is_sampled: bool
    parent: Parent | None = None

    @property
    def trace_hex(self) -> str:
        """The trace id as logs and headers write it: 32 hexadecimal digits."""
        return f"{self.trace_id:032x}"


def parse(headers: Iterable[tuple[str, str]]) -> Parent | None:
    """The caller's span; None where no sound `traceparent` (exactly one of them) came."""
    found: list[str] = []
    states: list[str] = []
    for name, value in headers:
        lowered = name.lower()
        if lowered == TRACEPARENT:
            found.append(value)
        elif lowered == TRACESTATE:
            states.append(value)
    match = _TRACEPARENT.fullmatch(found[0].strip()) if len(found) == 1 else None
    if match is None:
        return None
    version, trace_hex, span_hex, flags, rest = match.groups()
    trace_id, span_id = int(trace_hex, 16), int(span_hex, 16)
    if version == "ff" or (version == "00" and rest) or not trace_id or not span_id:
        return None
    state = ",".join(states)
    return Parent(
        trace_id, span_id, bool(int(flags, 16) & _SAMPLED), state if len(state) <= MAX_TRACESTATE_CHARS else ""
    )


def render(trace: Trace, span_id: int) -> str:
    """The `traceparent` that names this span of the trace as the caller."""
    return f"00-{trace.trace_id:032x}-{span_id:016x}-{_SAMPLED if trace.is_sampled else 0:02x}"


def with_parent(headers: Sequence[tuple[str, str]], trace: Trace, span_id: int) -> tuple[tuple[str, str], ...]:
    """The headers of a call, the caller named in them being this span of ours."""
    kept = [(name, value) for name, value in headers if name.lower() not in (TRACEPARENT, TRACESTATE)]
    kept.append((TRACEPARENT, render(trace, span_id)))
    if trace.parent is not None and trace.parent.tracestate:
        kept.append((TRACESTATE, trace.parent.tracestate))
    return tuple(kept)


class Ids:
    """Draws ids, and says which traces are recorded: as the caller did, else this share of them."""

    def __init__(self, *, sample_ratio: float, rng: random.Random) -> None:
        """0 <= `sample_ratio` <= 1."""
        self._bound = round(sample_ratio * 2**64)
        self._rng = rng

    def span_id(self) -> int:
        """A new span id, never 0."""
        return self._rng.getrandbits(64) or 1

    def trace(self, parent: Parent | None) -> Trace:
        """A request's place in its caller's trace, or in a new one."""
        if parent is not None:
            return Trace(parent.trace_id, self.span_id(), parent.is_sampled, parent)
        trace_id = self._rng.getrandbits(128) or 1
        return Trace(trace_id, self.span_id(), self.samples(trace_id))

    def samples(self, trace_id: int) -> bool:
        """Whether a new trace is recorded: decided by its id, so that every service of one ratio decides alike.

        Source: OpenTelemetry's TraceIdRatioBased sampler, which compares the low 64 bits.
        """
        return trace_id & (2**64 - 1) < self._bound
