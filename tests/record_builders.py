"""Finished records for tests, each field open to change."""

from __future__ import annotations

from typing import Any

from gateway.core.candidates import Candidates
from gateway.core.types import Slo
from gateway.records import Attempt, Outcome, RequestRecord
from gateway.trace_context import Trace
from tests.builders import an_estimate

PAIRS = Candidates(
    pair_count=4,
    prefill=("p1", "p2", "p1", "p2"),
    decode=("d1", "d1", "d2", "d2"),
    cost=(1.0, 2.0, 3.0, float("inf")),
    ttft_s=(1.15, 1.2, 1.3, 1.4),
    tbt_s=(0.05, 0.05, 0.06, 0.06),
    wait_s=(0.0, 0.1, 0.0, 0.1),
    cached_tokens=(32, 0, 32, 0),
)


def an_attempt(**fields: Any) -> Attempt:
    """A hand-off from p1 to d1 that was predicted to take 1.15 s and took 0.9."""
    usual = {
        "number": 1,
        "decided_at": 10.001,
        "decision_s": 100e-6,
        "sent_at": 10.001,
        "estimate": an_estimate(cached_tokens=32),
        "candidates": PAIRS,
        "prefilled_at": 10.8,
        "first_token_at": 10.9,
        "ended_at": 12.0,
        "reported_prompt_tokens": 101,
        "reported_cached_tokens": 48,
        "failure": None,
        "engine_at_fault": None,
        "prefill_span_id": 2,
        "decode_span_id": 3,
    }
    return Attempt(**(usual | fields))


def a_record(**fields: Any) -> RequestRecord:
    """A served request of 20 tokens that arrived at 10.0; Unix time is 1000 seconds more."""
    usual = {
        "id": "ours",
        "client_id": "theirs",
        "path": "/v1/chat/completions",
        "model": "m",
        "tenant": "default",
        "slo": Slo(),
        "is_stream": True,
        "prompt_tokens": 100,
        "is_prompt_exact": False,
        "max_output_tokens": 20,
        "arrived_at": 10.0,
        "gathered_at": 10.001,
        "ended_at": 12.0,
        "unix_offset_s": 1000.0,
        "attempts": (an_attempt(),),
        "outcome": Outcome.SERVED,
        "reason": "",
        "message": "",
        "retry_after_s": None,
        "status": 200,
        "output_tokens": 20,
        "tbt_s": 0.06,
        "trace": Trace(1, 1, is_sampled=True),
    }
    return RequestRecord(**(usual | fields))
