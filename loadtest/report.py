"""What a run came to: latencies, goodput and attainment, from live requests and simulated ones alike. Pure.

A refused or failed request is never attained and stands in every ratio's denominator, so refusing cannot improve a
figure. Ratios are given in requests and in prompt tokens, because counting requests alone rewards refusing long ones.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum

import msgspec
import numpy as np

from gateway.core.errors import GatewayError
from gateway.core.types import Slo


class OutcomeError(GatewayError):
    """A measured value is impossible: not finite, or negative."""

    kind = "outcome_error"


class Status(StrEnum):
    """How a request ended, seen from its sender."""

    OK = "ok"
    REFUSED = "refused"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request as its sender saw it. `None` means it could not be seen. Raises OutcomeError."""

    arrived_at: float
    """The instant it was due, on any one clock for the whole run. All durations below count from here."""
    status: Status
    prompt_tokens: int
    output_tokens: int = 0
    ttft_s: float | None = None
    tbt_s: float | None = None
    """Mean of the slowest 10 % of token gaps; None below two tokens."""
    tpot_s: float | None = None
    """Mean token gap; None below two tokens."""
    e2e_s: float | None = None
    lag_s: float = 0.0
    """How late the sender was; a simulator never is."""
    reason: str = ""
    """Why it was refused or failed, in a word."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.arrived_at):
            raise OutcomeError(f"arrived_at must be finite, got {self.arrived_at}", param="arrived_at")
        for name in ("prompt_tokens", "output_tokens", "ttft_s", "tbt_s", "tpot_s", "e2e_s", "lag_s"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise OutcomeError(f"{name} must be finite and >= 0, got {value}", param=name)


def slowest_tenth_mean_s(gaps_s: Sequence[float]) -> float | None:
    """TBT of one request: mean of its longest tenth of token gaps (rounded up to whole gaps), None without gaps.

    Source: Mooncake, FAST'25, section 5.1.
    """
    if not gaps_s:
        return None
    count = -(-len(gaps_s) // 10)
    return math.fsum(sorted(gaps_s, reverse=True)[:count]) / count


def is_attained(outcome: Outcome, slo: Slo) -> bool:
    """Whether the request was answered within every bound. A bound that could not be seen is not met.

    An answer whose first token was seen but that has no gap (one token) meets any bound on gaps.
    """
    if outcome.status is not Status.OK:
        return False
    has_no_gap = outcome.tbt_s is None and outcome.ttft_s is not None
    return (
        _is_within(outcome.ttft_s, slo.ttft_s)
        and (has_no_gap or _is_within(outcome.tbt_s, slo.tbt_s))
        and (has_no_gap or _is_within(outcome.tpot_s, slo.tpot_s))
        and _is_within(outcome.e2e_s, slo.deadline_s)
    )


def _is_within(value: float | None, bound: float | None) -> bool:
    return bound is None or (value is not None and value <= bound)


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean, quantiles (linear between ranks) and maximum of a sample, all None when it is empty."""

    count: int
    mean: float | None = None
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    max: float | None = None

    @classmethod
    def of(cls, sample: Iterable[float | None]) -> Spread:
        """The spread of the values that are not None."""
        values = np.array([value for value in sample if value is not None], dtype=np.float64)
        if values.size == 0:
            return cls(count=0)
        p50, p90, p99 = (float(q) for q in np.quantile(values, (0.5, 0.9, 0.99)))
        return cls(int(values.size), float(values.mean()), p50, p90, p99, float(values.max()))


@dataclass(frozen=True, slots=True)
class Report:
    """Figures of one run. Spreads are over answered requests, seconds; ratios over all of them, 0 <= ratio <= 1."""

    slo: Slo
    requests: int
    ok: int
    refused: int
    errors: int
    attained: int
    duration_s: float
    """From the first arrival to the last thing that happened."""
    goodput_per_s: float | None
    """Attained requests per second; None when no time passed."""
    attained_ratio: float | None
    """Of requests; None without requests."""
    attained_tokens_ratio: float | None
    """Of prompt tokens; None without tokens."""
    output_tokens: int
    ttft_s: Spread
    tbt_s: Spread
    tpot_s: Spread
    e2e_s: Spread
    lag_s: Spread
    reasons: dict[str, int]
    """Why requests were refused or failed, most frequent first."""

    def to_json(self) -> str:
        """The report as one JSON object; None stands for what is not known, never NaN."""
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Report:
        """What `to_json` wrote. Raises OutcomeError for anything else."""
        try:
            return msgspec.json.decode(text, type=cls)
        except msgspec.MsgspecError as error:
            raise OutcomeError(f"not a report: {error}") from None

    def to_table(self) -> str:
        """The report as text for people: counts, attainment, then one row per latency in milliseconds."""
        rows = [_head_row(), *(_latency_row(name, getattr(self, name)) for name in _LATENCIES)]
        return "\n".join([*_summary_lines(self), "", *rows])


_LATENCIES = {"ttft_s": "TTFT", "tbt_s": "TBT", "tpot_s": "TPOT", "e2e_s": "end to end", "lag_s": "sender's lag"}
_COLUMNS = ("mean", "p50", "p90", "p99", "max")


def summarise(outcomes: Iterable[Outcome], slo: Slo, *, duration_s: float | None = None) -> Report:
    """The report of a run; `duration_s` overrides the observed span when goodput is to count over a fixed window."""
    seen = list(outcomes)
    answered = [outcome for outcome in seen if outcome.status is Status.OK]
    attained = [outcome for outcome in answered if is_attained(outcome, slo)]
    span_s = _span_s(seen) if duration_s is None else duration_s
    counts = Counter(outcome.status for outcome in seen)
    reasons = Counter(outcome.reason for outcome in seen if outcome.reason)
    return Report(
        slo=slo,
        requests=len(seen),
        ok=counts[Status.OK],
        refused=counts[Status.REFUSED],
        errors=counts[Status.ERROR],
        attained=len(attained),
        duration_s=span_s,
        goodput_per_s=_ratio(len(attained), span_s),
        attained_ratio=_ratio(len(attained), len(seen)),
        attained_tokens_ratio=_ratio(_prompt_tokens(attained), _prompt_tokens(seen)),
        output_tokens=sum(outcome.output_tokens for outcome in answered),
        ttft_s=Spread.of(outcome.ttft_s for outcome in answered),
        tbt_s=Spread.of(outcome.tbt_s for outcome in answered),
        tpot_s=Spread.of(outcome.tpot_s for outcome in answered),
        e2e_s=Spread.of(outcome.e2e_s for outcome in answered),
        lag_s=Spread.of(outcome.lag_s for outcome in seen),
        reasons=dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
    )


def _span_s(outcomes: Sequence[Outcome]) -> float:
    if not outcomes:
        return 0.0
    return max(o.arrived_at + (o.e2e_s or 0.0) for o in outcomes) - min(o.arrived_at for o in outcomes)


def _prompt_tokens(outcomes: Iterable[Outcome]) -> int:
    return sum(outcome.prompt_tokens for outcome in outcomes)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def _summary_lines(report: Report) -> list[str]:
    lines = [
        f"requests  {report.requests}: {report.ok} ok, {report.refused} refused, {report.errors} failed"
        f" in {report.duration_s:.1f} s",
        f"SLO       {_bounds(report.slo)}",
        f"attained  {_percent(report.attained_ratio)} of requests,"
        f" {_percent(report.attained_tokens_ratio)} of prompt tokens",
        f"goodput   {_number(report.goodput_per_s, 3)} requests/s",
    ]
    if report.reasons:
        lines.append("reasons   " + ", ".join(f"{reason} {count}" for reason, count in report.reasons.items()))
    return lines


def _bounds(slo: Slo) -> str:
    named = (("TTFT", slo.ttft_s), ("TBT", slo.tbt_s), ("TPOT", slo.tpot_s), ("end to end", slo.deadline_s))
    return ", ".join(f"{name} <= {bound * 1e3:g} ms" for name, bound in named if bound is not None) or "none"


def _head_row() -> str:
    return f"{'ms':<14}{'count':>8}" + "".join(f" {column:>10}" for column in _COLUMNS)


def _latency_row(name: str, spread: Spread) -> str:
    cells = (None if (value := getattr(spread, column)) is None else value * 1e3 for column in _COLUMNS)
    return f"{_LATENCIES[name]:<14}{spread.count:>8}" + "".join(f" {_number(cell, 1):>10}" for cell in cells)


def _percent(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.1%}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
