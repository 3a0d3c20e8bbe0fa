"""What an answer says of the decision behind it: the pair and its prediction, or why not and what was asked for."""

from __future__ import annotations

import math

from adapters.headers import DEADLINE
from gateway.core.types import Dispatch, Estimate, Reject, RejectReason, Slo
from gateway.driver import Decided

REFUSAL_STATUS = {
    RejectReason.NO_PREFILL: 503,
    RejectReason.NO_DECODE: 503,
    RejectReason.UNKNOWN_MODEL: 404,
    RejectReason.PROMPT_TOO_LONG: 400,
    RejectReason.QUEUE_FULL: 429,
    RejectReason.WAITED_TOO_LONG: 429,
    RejectReason.TOO_MANY_ATTEMPTS: 502,
    RejectReason.TTFT_SLO: 429,
    RejectReason.TBT_SLO: 429,
    RejectReason.DEADLINE_SLO: 429,
    RejectReason.DEADLINE_PAST: 400,
    RejectReason.RATE_LIMITED: 429,
    RejectReason.TOO_MANY_IN_FLIGHT: 429,
}
REFUSAL_KIND = {400: "invalid_request_error", 404: "not_found_error", 429: "rate_limit_error"}
REFUSAL_PARAM = {RejectReason.DEADLINE_PAST: DEADLINE, RejectReason.UNKNOWN_MODEL: "model"}


def dispatch_headers(decided: Decided, dispatch: Dispatch) -> dict[str, str]:
    """The pair that was chosen, how fast, and what was predicted."""
    estimate = dispatch.estimate
    return {
        "x-sluice-prefill": estimate.prefill,
        "x-sluice-decode": estimate.decode,
        "x-sluice-decision-us": str(round(decided.decision_s * 1e6)),
        "x-sluice-attempts": str(dispatch.attempt),
        "x-sluice-cached-tokens": str(estimate.cached_tokens),
    } | _as_headers(predicted_ms(estimate, decided.waited_s))


def refusal_headers(reject: Reject, slo: Slo, waited_s: float) -> dict[str, str]:
    """The reason, the predicted and the promised numbers, and when to come back."""
    headers = {"x-sluice-reason": str(reject.reason)} | _as_headers(refusal_ms(reject, slo, waited_s))
    if is_lasting(reject):
        headers["x-should-retry"] = "false"
    elif REFUSAL_STATUS[reject.reason] in (429, 503):
        headers["retry-after"] = str(max(1, math.ceil(_retry_after_s(reject))))
        headers["retry-after-ms"] = str(_retry_after_ms(reject))
    return headers


def is_lasting(reject: Reject) -> bool:
    """Whether it would be refused at any time: engines that have nothing else to do are too slow for its bounds.

    OpenAI's clients do not try again by themselves then. Source: openai-python, `_base_client.py` `_should_retry`.
    """
    return reject.retry_after_s is None and reject.reason in (RejectReason.TTFT_SLO, RejectReason.TBT_SLO)


def refusal_members(reject: Reject, slo: Slo, waited_s: float) -> dict[str, float]:
    """The numbers of a refusal as members of an error body, milliseconds; the time to come back is as in the header."""
    members = as_members(refusal_ms(reject, slo, waited_s))
    if REFUSAL_STATUS[reject.reason] in (429, 503) and not is_lasting(reject):
        members["retry_after_ms"] = _retry_after_ms(reject)
    return members


def _retry_after_s(reject: Reject) -> float:
    return 1.0 if reject.retry_after_s is None else reject.retry_after_s


def _retry_after_ms(reject: Reject) -> int:
    return max(1, math.ceil(_retry_after_s(reject) * 1e3))


def refusal_ms(reject: Reject, slo: Slo, waited_s: float) -> dict[str, float]:
    """The numbers behind a refusal, milliseconds: those of the best pair where one was looked at, and the bounds."""
    predicted = {} if reject.best is None else predicted_ms(reject.best, waited_s)
    return predicted | promised_ms(slo)


def predicted_ms(estimate: Estimate, waited_s: float) -> dict[str, float]:
    """What is predicted, milliseconds: the first token counted from arrival, and the gaps after it."""
    return {
        "predicted-ttft-ms": (waited_s + estimate.ttft_s) * 1e3,
        "predicted-tbt-ms": estimate.tbt_s * 1e3,
    }


def promised_ms(slo: Slo) -> dict[str, float]:
    """The bounds that the request has, milliseconds."""
    bounds = {
        "slo-ttft-ms": slo.ttft_s,
        "slo-tbt-ms": slo.tbt_s,
        "slo-tpot-ms": slo.tpot_s,
        "slo-deadline-ms": slo.deadline_s,
    }
    return {name: bound_s * 1e3 for name, bound_s in bounds.items() if bound_s is not None}


def as_members(numbers: dict[str, float]) -> dict[str, float]:
    """The same for a body: names as members of an object, a tenth of a millisecond is enough."""
    return {name.replace("-", "_"): round(value, 1) for name, value in numbers.items()}


def _as_headers(numbers: dict[str, float]) -> dict[str, str]:
    return {f"x-sluice-{name}": f"{value:.1f}" for name, value in numbers.items()}
