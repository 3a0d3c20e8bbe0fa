"""Each stage is checked when it starts: the prefill at arrival, the decode when the prefill is done and may be wasted.

The baseline of the paper's overload comparison. The live gateway sends both legs of a hand-off as one exchange, so
only the simulator can obey the second refusal.
Source: Mooncake, arXiv 2407.00079 v3, section 7.
"""

from __future__ import annotations

from dataclasses import dataclass

from gateway.admissions.bounds import refuse_tbt, require_margin
from gateway.admissions.decode_load import present_load
from gateway.admissions.ttft import Ttft
from gateway.core.interfaces import Arrival, PrefillEnd, Refusal


@dataclass(frozen=True, slots=True)
class Stage:
    """Predicted TTFT at arrival; the step time of the decode engine, this request included, after the prefill."""

    ttft_margin: float = 1.0
    tbt_margin: float = 1.0
    """Predictions are multiplied by these before they are compared."""

    def __post_init__(self) -> None:
        require_margin(self.ttft_margin)
        require_margin(self.tbt_margin)

    def start(self) -> Stage:
        return self

    def arrive(self, arrival: Arrival, *, now: float) -> Refusal | None:
        """A refusal when the first token would be late."""
        return Ttft(self.ttft_margin).arrive(arrival, now=now)

    def end_prefill(self, prefill: PrefillEnd, *, now: float) -> Refusal | None:
        """A refusal when the decode engine's batch is too full by now."""
        state = prefill.cluster.engines.get(prefill.estimate.decode)
        if state is None:
            return None
        load = present_load(state, but=prefill.request.id)
        step_s = prefill.estimator.decode_step_s(
            state.engine, batch=load.batch + 1, kv_tokens=load.kv_tokens + prefill.request.prompt_tokens
        )
        return refuse_tbt(step_s, prefill.request.slo.step_s, self.tbt_margin)
