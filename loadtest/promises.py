"""Whether stated quantiles kept their word in a run: margins learnt in the order in which its outcomes came. Pure.

Each dispatch is promised its prediction times the margin of that instant; each outcome, when it is known, teaches the
margins. That is what a gateway does, so the coverage of a run can be had from its flights alone, under any rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.core.types import Role
from loadtest.flight import Flight
from predictors.calibration import Calibration, MarginState


@dataclass(frozen=True, slots=True)
class Prediction:
    """One prediction of a run and what came of it."""

    made_at: float
    known_at: float
    tokens: int
    """Of the prompt."""
    predicted_s: float
    actual_s: float


@dataclass(frozen=True, slots=True)
class Promise:
    """A quantile as it was stated."""

    made_at: float
    promised_s: float
    actual_s: float
    state: MarginState
    """Of the role's margin when it was stated."""

    @property
    def is_kept(self) -> bool:
        return self.actual_s <= self.promised_s


def ttft_predictions(flights: Sequence[Flight]) -> list[Prediction]:
    """From dispatch to first token, of every request that had one."""
    found = []
    for flight in flights:
        sent_at, first_at = flight.sent_at, flight.first_token_at
        if flight.dispatch is not None and sent_at is not None and first_at is not None:
            predicted_s = flight.dispatch.estimate.ttft_s
            found.append(Prediction(sent_at, first_at, flight.trace.prompt_tokens, predicted_s, first_at - sent_at))
    return found


def tbt_predictions(flights: Sequence[Flight]) -> list[Prediction]:
    """The step time predicted at dispatch against the slow mean gap, of every request with more than one token."""
    found = []
    for flight in flights:
        sent_at, outcome = flight.sent_at, flight.outcome
        if flight.dispatch is not None and sent_at is not None and outcome is not None:
            ended_at = flight.request.arrived_at + (outcome.e2e_s or 0.0)
            predicted_s = flight.predicted_tbt_s or flight.dispatch.estimate.tbt_s
            if outcome.tbt_s:
                found.append(Prediction(sent_at, ended_at, flight.trace.prompt_tokens, predicted_s, outcome.tbt_s))
    return found


def promises(predictions: Sequence[Prediction], role: Role, settings: Calibration | None = None) -> list[Promise]:
    """What was promised for each prediction, in the order in which they were made."""
    margins = (settings or Calibration()).start()
    # What ends at an instant is known to what is decided at it.
    happenings = sorted(
        [(p.known_at, 0, number) for number, p in enumerate(predictions)]
        + [(p.made_at, 1, number) for number, p in enumerate(predictions)]
    )
    made: dict[int, Promise] = {}
    for _, is_new, number in happenings:
        p = predictions[number]
        if is_new:
            promised_s = margins.upper(role, p.tokens, p.predicted_s)
            made[number] = Promise(p.made_at, promised_s, p.actual_s, margins.state(role))
        elif number in made:
            promised_s = made[number].promised_s
            margins.observe(role, p.tokens, predicted_s=p.predicted_s, actual_s=p.actual_s, promised_s=promised_s)
    return list(made.values())


def kept_ratio(made: Sequence[Promise], *, start_s: float = 0.0, end_s: float = float("inf")) -> float | None:
    """The share kept of the promises made in that time, the cold ones at the start left out; None without any."""
    judged = [p.is_kept for p in made if start_s <= p.made_at < end_s and p.state is not MarginState.COLD]
    return sum(judged) / len(judged) if judged else None
