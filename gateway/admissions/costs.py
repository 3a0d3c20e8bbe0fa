"""What one request takes of both stages, in seconds of the whole stage, and what it is worth."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from gateway.core.forecast import Forecast
from gateway.core.interfaces import Arrival

TINY = 1e-12


class Objective(StrEnum):
    """What is kept under overload."""

    REQUESTS = "requests"
    """Most requests in time: each is worth the same, so cheap ones go first."""
    TOKENS = "tokens"
    """Most prompt tokens in time: each is worth its length."""
    FAIR = "fair"
    """Whoever is next in the queue's order, whatever it costs."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of each stage as a whole (a second of one of eight engines is an eighth), and the value."""

    prefill_s: float
    decode_s: float
    value: float


def cost_of(arrival: Arrival, forecast: Forecast, objective: Objective) -> Cost:
    """The request's cost with the best prefix there is and the output length expected of it."""
    pairs, request = arrival.pairs, arrival.request
    is_staged = ~pairs.is_local if (~pairs.is_local).any() else np.ones(len(pairs), dtype=bool)
    stages = len(np.unique(pairs.prefill_row[is_staged]))
    value = request.prompt_tokens if objective is Objective.TOKENS else 1.0
    return Cost(float(pairs.prefill_s[is_staged].min()) / stages, _decode_s(arrival, forecast), value)


def _decode_s(arrival: Arrival, forecast: Forecast) -> float:
    """The KV tokens it will hold, times how long, over what all decode engines hold at a step of its bound.

    A place in a batch counts as the KV tokens that take as long. Without a bound only memory is scarce.
    """
    request, law = arrival.request, arrival.law
    if law is None:
        return 0.0
    output_tokens = float(law.remaining_tokens((request.model, request.tenant), [0.0])[0])
    per_token_s = np.maximum(forecast.per_token_s, TINY)
    step_s = float("inf") if request.slo.step_s is None else request.slo.step_s
    room_tokens = np.minimum((step_s - forecast.base_s) / per_token_s, forecast.capacity_tokens)
    total_tokens = float(np.maximum(room_tokens, 0.0).sum())
    if not TINY < total_tokens < float("inf"):
        return 0.0
    place_tokens = float((forecast.per_request_s / per_token_s).mean())
    held_tokens = request.prompt_tokens + output_tokens / 2 + place_tokens
    return held_tokens * output_tokens * min(step_s, float(arrival.pairs.tbt_s.max())) / total_tokens
