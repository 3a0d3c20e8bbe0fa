"""Refuses on the predicted TTFT of the chosen pair, and looks no further.

Source: Mooncake, arXiv 2407.00079 v3, Algorithm 1 (its TTFT half): `if TTFT > TTFT_SLO: reject`.
"""

from __future__ import annotations

from dataclasses import dataclass

from gateway.admissions.bounds import refuse_ttft, require_margin
from gateway.core.interfaces import Arrival, PrefillEnd, Refusal


@dataclass(frozen=True, slots=True)
class Ttft:
    """The pair that the policy prefers must be predicted to keep the TTFT bound."""

    margin: float = 1.0
    """Predictions are multiplied by it before they are compared."""

    def __post_init__(self) -> None:
        require_margin(self.margin)

    def start(self) -> Ttft:
        return self

    def arrive(self, arrival: Arrival, *, now: float) -> Refusal | None:
        """A refusal when the first token would be late, its time in the gateway included."""
        waited_s = now - arrival.request.arrived_at
        ttft_s = waited_s + float(arrival.pairs.ttft_s[arrival.chosen_row])
        return refuse_ttft(ttft_s, arrival.request.slo.ttft_s, self.margin)

    def end_prefill(self, prefill: PrefillEnd, *, now: float) -> None:
        """Every decode begins."""
