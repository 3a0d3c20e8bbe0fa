"""Early rejection: both stages are checked at arrival, the decode engine by the load it has at that moment.

That load will be another when the prefill is done, which makes the loads of both stages swing in anti-phase. The check
after the prefill stays, as in the paper: what slipped through is still refused.
Source: Mooncake, arXiv 2407.00079 v3, section 7.2.
"""

from __future__ import annotations

from dataclasses import dataclass

from gateway.admissions.bounds import refuse_tbt
from gateway.admissions.decode_load import present_load
from gateway.admissions.stage import Stage
from gateway.core.interfaces import Arrival, PrefillEnd, Refusal


@dataclass(frozen=True, slots=True)
class Early:
    """Predicted TTFT, and the step time of the chosen decode engine with its present batch and this request."""

    ttft_margin: float = 1.0
    tbt_margin: float = 1.0
    """Predictions are multiplied by these before they are compared."""

    def __post_init__(self) -> None:
        Stage(self.ttft_margin, self.tbt_margin)

    def start(self) -> Early:
        return self

    def arrive(self, arrival: Arrival, *, now: float) -> Refusal | None:
        """A refusal when the first token would be late, or the decode engine is too full now."""
        refusal = Stage(self.ttft_margin).arrive(arrival, now=now)
        if refusal is not None:
            return refusal
        decode = arrival.pairs.decodes[arrival.pairs.decode_row[arrival.chosen_row]].engine
        load = present_load(arrival.cluster.engines[decode.id], but=arrival.request.id)
        step_s = arrival.estimator.decode_step_s(
            decode, batch=load.batch + 1, kv_tokens=load.kv_tokens + arrival.request.prompt_tokens
        )
        return refuse_tbt(step_s, arrival.request.slo.step_s, self.tbt_margin)

    def end_prefill(self, prefill: PrefillEnd, *, now: float) -> Refusal | None:
        """A refusal when the decode engine's batch is too full by now."""
        return Stage(self.ttft_margin, self.tbt_margin).end_prefill(prefill, now=now)
