"""Early rejection based on prediction: at arrival, the decode load at the instant this prefill will end.

For that instant t the rule (1) counts the requests whose prefill ends by t, (2) takes away those whose decode is over
by then, every decode being taken to last `decode_s`, and (3) spreads what remains uniformly over the decode engines.
"Lasts" can be read in two ways. Literally, a decode is over `decode_s` after it began: then the many that run longer
vanish from the count and the step is underestimated. As residual time, one that runs now goes on for another
`decode_s`, however long it has run.
Source: Mooncake, arXiv 2407.00079 v3, section 7.3. The paper gives no value for the duration.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gateway.admissions.bounds import refuse_tbt
from gateway.admissions.decode_load import decoding_engines, load_of
from gateway.admissions.stage import Stage
from gateway.core.cluster import Cluster, Reservation
from gateway.core.interfaces import Arrival, PrefillEnd, Refusal


@dataclass(frozen=True, slots=True)
class Predicted:
    """Predicted TTFT, and the mean step time of the decode engines when the prefill ends."""

    ttft_margin: float = 1.0
    tbt_margin: float = 1.0
    """Predictions are multiplied by these before they are compared."""
    decode_s: float = 8.0
    """Duration of every decode. Default: 343 tokens, the mean of the conversation trace, at 23 ms each."""
    is_residual: bool = False
    """Whether `decode_s` counts from now for those that decode now."""

    def __post_init__(self) -> None:
        Stage(self.ttft_margin, self.tbt_margin)
        if not 0.0 < self.decode_s < float("inf"):
            raise ValueError("decode_s must be above 0 and finite")

    def start(self) -> Predicted:
        return self

    def arrive(self, arrival: Arrival, *, now: float) -> Refusal | None:
        """A refusal when the first token would be late, or the decode engines are too full by the end of its prefill.

        The request counts as one more among those spread over the engines.
        """
        refusal = Stage(self.ttft_margin).arrive(arrival, now=now)
        if refusal is not None:
            return refusal
        row = arrival.chosen_row
        ends_at = now + float(arrival.pairs.wait_s[row] + arrival.pairs.fetch_s[row] + arrival.pairs.prefill_s[row])
        engines = [state.engine for state in decoding_engines(arrival.cluster)]
        load = load_of(self._decoding_at(ends_at, arrival.cluster, now))
        batch = -(-(load.batch + 1) // len(engines))
        kv_tokens = (load.kv_tokens + arrival.request.prompt_tokens) // len(engines)
        step_s = [arrival.estimator.decode_step_s(engine, batch=batch, kv_tokens=kv_tokens) for engine in engines]
        return refuse_tbt(sum(step_s) / len(step_s), arrival.request.slo.step_s, self.tbt_margin)

    def end_prefill(self, prefill: PrefillEnd, *, now: float) -> Refusal | None:
        """A refusal when the decode engine's batch is too full by now."""
        return Stage(self.ttft_margin, self.tbt_margin).end_prefill(prefill, now=now)

    def _decoding_at(self, at: float, cluster: Cluster, now: float) -> Iterator[Reservation]:
        """The requests that are predicted to decode at that instant."""
        for state in decoding_engines(cluster):
            for reservation in state.decoding.values():
                begins_at = decode_begins_at(reservation)
                ends_at = (max(begins_at, now) if self.is_residual else begins_at) + self.decode_s
                if begins_at <= at < ends_at:
                    yield reservation


def decode_begins_at(reservation: Reservation) -> float:
    """When the prefill ended, or is predicted to."""
    if reservation.prefill_done_at is not None:
        return reservation.prefill_done_at
    estimate = reservation.estimate
    return reservation.sent_at + estimate.wait_s + estimate.fetch_s + estimate.prefill_s
