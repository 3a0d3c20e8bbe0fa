"""Finished records in words: one decision with all its candidates, a row of a list, a line of the log. Pure.

Seconds everywhere, instants as Unix time. A record holds no prompt text but where the operator put it on spans; these
words leave that out too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from gateway.core.candidates import Candidates
from gateway.core.types import Estimate
from gateway.records import Attempt, RequestRecord


@dataclass(frozen=True, slots=True)
class Filter:
    """Which records of the ring are asked for; None lets all pass."""

    outcome: str | None = None
    """An outcome, or the reason of one."""
    model: str | None = None
    tenant: str | None = None

    def admits(self, record: RequestRecord) -> bool:
        """Whether the record is one of them."""
        return (
            (self.outcome is None or self.outcome in (record.outcome, record.reason))
            and (self.model is None or self.model == record.model)
            and (self.tenant is None or self.tenant == record.tenant)
        )


def listed(records: Iterable[RequestRecord], wanted: Filter, *, limit: int) -> list[dict[str, Any]]:
    """A row for each of the first `limit` records that are wanted."""
    return [row(record) for record in islice(filter(wanted.admits, records), limit)]


def row(record: RequestRecord) -> dict[str, Any]:
    """One record in a list: what was decided, predicted and seen; absent: not known."""
    estimate, cached = record.estimate, record.cached_tokens
    return _known(
        {
            "id": record.id,
            "client_id": None if record.client_id == record.id else record.client_id,
            "trace_id": record.trace.trace_hex if record.trace else None,
            "at": round(record.unix_s(record.arrived_at), 6),
            "path": record.path,
            "model": record.model,
            "tenant": record.tenant,
            "outcome": record.outcome,
            "reason": record.reason or None,
            "status": record.status,
            "prefill": estimate.prefill if estimate else None,
            "decode": estimate.decode if estimate else None,
            "attempts": len(record.attempts),
            "prompt_tokens": record.prompt_tokens,
            "output_tokens": record.output_tokens,
            "cached_tokens": estimate.cached_tokens if estimate else None,
            "reported_cached_tokens": cached[1] if cached else None,
            "wait_s": _rounded(record.wait_s),
            "ttft_s": _rounded(record.ttft_s),
            "predicted_ttft_s": _rounded(record.predicted_ttft_s),
            "slo_ttft_s": record.slo.ttft_s,
            "ttft_headroom_s": _rounded(record.ttft_headroom_s),
            "tbt_s": _rounded(record.tbt_s),
            "predicted_tbt_s": _rounded(record.predicted_tbt_s),
            "slo_tbt_s": record.slo.tbt_s,
            "slo_tpot_s": record.slo.tpot_s,
            "tbt_headroom_s": _rounded(record.tbt_headroom_s),
            "slo_deadline_s": record.slo.deadline_s,
            "retry_after_s": _rounded(record.retry_after_s),
            "decision_us": round(sum(attempt.decision_s for attempt in record.attempts) * 1e6, 1),
            "duration_s": _rounded(record.ended_at - record.arrived_at),
        }
    )


def explained(record: RequestRecord) -> dict[str, Any]:
    """One record whole: its row, what the client was told, and every attempt with its candidates."""
    told = {"message": record.message or None, "is_stream": record.is_stream, "is_prompt_exact": record.is_prompt_exact}
    gathered_s = None if record.gathered_at is None else _rounded(record.gathered_at - record.arrived_at)
    attempts = [_attempt(record, attempt) for attempt in record.attempts]
    limits = {"max_output_tokens": record.max_output_tokens, "gather_s": gathered_s}
    return row(record) | _known(told | limits) | {"tries": attempts}


def log_line(record: RequestRecord) -> dict[str, Any]:
    """The fields of its line in the log."""
    fields = row(record)
    fields["request_id"] = fields.pop("id")
    del fields["at"]  # the line has its own time
    return fields


def _attempt(record: RequestRecord, attempt: Attempt) -> dict[str, Any]:
    def since_arrival(at: float | None) -> float | None:
        return None if at is None else _rounded(at - record.arrived_at)

    return _known(
        {
            "attempt": attempt.number,
            "decided_s": since_arrival(attempt.decided_at),
            "sent_s": since_arrival(attempt.sent_at),
            "prefilled_s": since_arrival(attempt.prefilled_at),
            "first_token_s": since_arrival(attempt.first_token_at),
            "ended_s": since_arrival(attempt.ended_at),
            "decision_us": round(attempt.decision_s * 1e6, 1),
            "failure": attempt.failure,
            "engine_at_fault": attempt.engine_at_fault,
            "chosen": _estimate(attempt.estimate) if attempt.sent_at is not None else None,
            "best": _estimate(attempt.estimate) if attempt.sent_at is None else None,
            "pair_count": attempt.candidates.pair_count if attempt.candidates else None,
            "candidates": _candidates(attempt.candidates) if attempt.candidates else None,
        }
    )


def _estimate(estimate: Estimate | None) -> dict[str, Any] | None:
    if estimate is None:
        return None
    return _known(
        {
            "prefill": estimate.prefill,
            "decode": estimate.decode,
            "ttft_s": _rounded(estimate.ttft_s),
            "tbt_s": _rounded(estimate.tbt_s),
            "wait_s": _rounded(estimate.wait_s),
            "fetch_s": _rounded(estimate.fetch_s),
            "prefill_s": _rounded(estimate.prefill_s),
            "hand_off_s": _rounded(estimate.hand_off_s),
            "join_s": _rounded(estimate.join_s),
            "cached_tokens": estimate.cached_tokens,
            "fetch_from": estimate.fetch_from,
        }
    )


def _candidates(candidates: Candidates) -> list[dict[str, Any]]:
    """One object per pair; a cost that is not finite (a pair that was not allowed) is left out: JSON has no word."""
    names = ("prefill", "decode", "ttft_s", "tbt_s", "wait_s", "cached_tokens")
    columns = (getattr(candidates, name) for name in names)
    rows = [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
    for pair, cost in zip(rows, candidates.cost, strict=True):
        pair |= {name: _rounded(pair[name]) for name in ("ttft_s", "tbt_s", "wait_s")}
        pair["cost"] = _rounded(cost)
    return [_known(pair) for pair in rows]


def _rounded(value: float | None) -> float | None:
    """To the microsecond; None for what is no number."""
    return None if value is None or value - value != 0 else round(value, 6)


def _known(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
