"""What is learnt from each request: its outcomes beside what was predicted, told to everybody who learns."""

from __future__ import annotations

from gateway.core.cluster import Cluster, Reservation
from gateway.core.events import Finished
from gateway.core.forecast import StepLines
from gateway.core.interfaces import (
    DecodeOutcome,
    Estimator,
    HandOffOutcome,
    LengthLaw,
    MarginLaw,
    PrefillOutcome,
)
from gateway.core.types import Role


class Learning:
    """Tells everybody who learns. Outcomes on engines that are gone teach nothing."""

    def __init__(
        self, estimator: Estimator, lines: StepLines, *, law: LengthLaw | None, margins: MarginLaw | None
    ) -> None:
        self._estimator = estimator
        self._lines = lines
        self.law = law
        self.margins = margins

    def sent(self, reservation: Reservation) -> None:
        """A request was dispatched: notes what its predictions promise by the margins of this instant."""
        if self.margins is not None:
            tokens = reservation.request.prompt_tokens
            reservation.ttft_factor = self.margins.factor(Role.PREFILL, tokens)
            reservation.tbt_factor = self.margins.factor(Role.DECODE, tokens)

    def prefilled(self, reservation: Reservation, cluster: Cluster, *, now: float) -> None:
        """A prefill ended."""
        estimate = reservation.estimate
        state = cluster.engines.get(estimate.prefill)
        if state is None:
            return
        # What is seen of a prefill in a decode engine's batch holds that batch's steps too.
        own = (
            estimate.prefill_s / (estimate.prefill_s + estimate.join_s) if estimate.prefill == estimate.decode else 1.0
        )
        busy_s = reservation.prefill_busy_s
        self._estimator.observe_prefill(
            PrefillOutcome(
                engine=state.engine,
                prompt_tokens=reservation.request.prompt_tokens,
                cached_tokens=estimate.cached_tokens,
                queued_ahead_s=estimate.wait_s,
                elapsed_s=own * (now - reservation.sent_at),
                busy_s=None if busy_s is None else own * busy_s,
                predicted_s=estimate.wait_s + estimate.prefill_s,
            )
        )

    def began(self, reservation: Reservation, cluster: Cluster, *, now: float) -> None:
        """The first token came. The time for which it was held between its legs was our choice, no error."""
        estimate = reservation.estimate
        if estimate.is_hand_off:
            self._handed_off(reservation, cluster, now)
        if self.margins is not None:
            self.margins.observe(
                Role.PREFILL,
                reservation.request.prompt_tokens,
                predicted_s=estimate.ttft_s,
                actual_s=now - reservation.sent_at - reservation.held_s,
                promised_s=_promised_s(estimate.ttft_s, reservation.ttft_factor),
            )

    def _handed_off(self, reservation: Reservation, cluster: Cluster, now: float) -> None:
        estimate = reservation.estimate
        prefill, decode = cluster.engines.get(estimate.prefill), cluster.engines.get(estimate.decode)
        if prefill is None or decode is None or reservation.prefill_done_at is None:
            return
        # What is seen holds the join too. Both get their predicted share: taking the predicted join off instead would
        # leave nothing, and nothing to learn, whenever the join was predicted too long.
        predicted_s = estimate.hand_off_s + estimate.join_s
        share = estimate.hand_off_s / predicted_s if predicted_s > 0 else 1.0
        self._estimator.observe_hand_off(
            HandOffOutcome(
                prefill=prefill.engine,
                decode=decode.engine,
                prompt_tokens=reservation.request.prompt_tokens,
                elapsed_s=share * (now - reservation.prefill_done_at - reservation.held_s),
            )
        )

    def finished(self, reservation: Reservation, cluster: Cluster, event: Finished) -> None:
        """A request was answered to its end."""
        request = reservation.request
        if event.output_tokens is not None and self.law is not None:
            self.law.observe((request.model, request.tenant), event.output_tokens)
        state = cluster.engines.get(reservation.estimate.decode)
        if state is None or event.tbt_s is None:
            return
        batch, kv_tokens = reservation.batch, reservation.batch_kv_tokens
        stall_s = slow_stall_s(reservation, event)
        if self.margins is not None:
            # Against the step of the fullest batch that it met: how full that gets is the gate's choice, no error.
            believed_s = self._estimator.decode_step_s(state.engine, batch=batch, kv_tokens=kv_tokens)
            promised_s = _promised_s(believed_s, reservation.tbt_factor)
            self.margins.observe(
                Role.DECODE,
                request.prompt_tokens,
                predicted_s=believed_s,
                actual_s=event.tbt_s - stall_s,
                promised_s=promised_s,
            )
        self._estimator.observe_decode(
            DecodeOutcome(
                engine=state.engine,
                batch=batch,
                kv_tokens=kv_tokens,
                output_tokens=event.output_tokens or reservation.output_tokens,
                tbt_s=event.tbt_s - stall_s,
                predicted_tbt_s=reservation.estimate.tbt_s,
            )
        )
        self._lines.forget()


def slow_stall_s(reservation: Reservation, event: Finished) -> float:
    """What prefills on its decode engine were predicted to add to the mean of its slowest tenth of gaps, seconds >= 0.

    At most half of what it was: a prediction that is too long must not leave a step that takes nothing.
    """
    gaps = max(1, (event.output_tokens or reservation.output_tokens) - 1)
    stall_s = min(reservation.longest_stall_s, reservation.stall_s / -(-gaps // 10))
    return min(stall_s, 0.5 * (event.tbt_s or 0.0))


def _promised_s(predicted_s: float, factor: float | None) -> float | None:
    """The prediction as it was promised; None for a request that came from a gateway whose margins are not known."""
    return None if factor is None else predicted_s * factor
