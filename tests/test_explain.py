from __future__ import annotations

import pytest

from gateway.core.types import Reject, RejectReason, Slo
from gateway.driver import Decided
from gateway.explain import REFUSAL_STATUS, dispatch_headers, refusal_headers, refusal_members
from tests.builders import a_dispatch, an_estimate


def test_what_is_predicted_for_the_first_token_counts_from_arrival() -> None:
    dispatch = a_dispatch(prefill_s=1.0, hand_off_s=0.0, join_s=0.0, tbt_s=0.05)
    headers = dispatch_headers(Decided(dispatch, decision_s=0.0, waited_s=2.0), dispatch)
    assert headers["x-sluice-predicted-ttft-ms"] == "3000.0"
    assert headers["x-sluice-predicted-tbt-ms"] == "50.0"


def test_a_refusal_tells_what_was_predicted_and_what_was_promised() -> None:
    best = an_estimate(prefill_s=1.0, hand_off_s=0.0, join_s=0.0, tbt_s=0.05)
    reject = Reject("r1", RejectReason.TTFT_SLO, "no", retry_after_s=1.25, best=best)
    slo = Slo(ttft_s=0.5, tpot_s=0.04)
    assert refusal_headers(reject, slo, waited_s=0.1) == {
        "x-sluice-reason": "ttft_slo",
        "x-sluice-predicted-ttft-ms": "1100.0",
        "x-sluice-predicted-tbt-ms": "50.0",
        "x-sluice-slo-ttft-ms": "500.0",
        "x-sluice-slo-tpot-ms": "40.0",
        "retry-after": "2",
        "retry-after-ms": "1250",
    }
    assert refusal_members(reject, slo, 0.1) == {
        "predicted_ttft_ms": 1100.0,
        "predicted_tbt_ms": 50.0,
        "slo_ttft_ms": 500.0,
        "slo_tpot_ms": 40.0,
        "retry_after_ms": 1250,
    }


@pytest.mark.parametrize("reason", list(RejectReason))
def test_only_what_passes_tells_when_to_come_back(reason: RejectReason) -> None:
    reject = Reject("r1", reason, "no", retry_after_s=2.0)
    headers = refusal_headers(reject, Slo(), waited_s=0.0)
    assert ("retry-after" in headers) is (REFUSAL_STATUS[reason] in (429, 503))
    members = refusal_members(reject, Slo(), waited_s=0.0)
    assert ("retry_after_ms" in members) is ("retry-after" in headers)
    assert "x-should-retry" not in headers


def test_who_would_be_refused_at_any_time_is_told_not_to_come_back() -> None:
    reject = Reject("r1", RejectReason.TTFT_SLO, "no")
    headers = refusal_headers(reject, Slo(ttft_s=0.001), waited_s=0.0)
    assert headers["x-should-retry"] == "false"
    assert "retry-after" not in headers
    assert "retry_after_ms" not in refusal_members(reject, Slo(ttft_s=0.001), waited_s=0.0)
