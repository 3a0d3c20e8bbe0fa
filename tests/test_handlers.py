from __future__ import annotations

import pytest

from adapters.base import Retry
from gateway.core.types import Reject, RejectReason
from gateway.dispatch import Dispatcher
from gateway.driver import Decided, Driver
from gateway.engine_call import CallLimits
from gateway.engines import Engines
from gateway.gather import Gather
from gateway.handlers import REFUSAL_STATUS, Exchanged, HandlerLimits, Handlers, explain
from gateway.journal import Journal
from gateway.tokens import PromptTokens, TokenLimits
from tests.builders import a_dispatch, a_scheduler


@pytest.fixture
async def handlers() -> Handlers:
    driver = Driver(a_scheduler(), Journal())
    engines = Engines(keepalive_s=1.0, max_idle=1, api_key=lambda _: None)
    dispatcher = Dispatcher(driver, {}, engines, CallLimits(1.0, 1.0, 1.0, 1000))
    gather = Gather(driver, PromptTokens({}, TokenLimits()), None)
    limits = HandlerLimits(max_body_bytes=1000, body_timeout_s=1.0, write_timeout_s=1.0, idle_timeout_s=1.0)
    return Handlers(driver, dispatcher, gather, limits, started_at=0.0)


def an_exchange() -> Exchanged:
    return Exchanged("our-id", "client-id", began_at=0.0)


def test_every_reason_of_a_refusal_has_a_status():
    assert REFUSAL_STATUS.keys() == set(RejectReason)


def test_the_explain_headers_name_the_pair_and_what_was_predicted():
    dispatch = a_dispatch(prefill="p7", decode="d9", prefill_s=0.25, hand_off_s=0.0, join_s=0.0)
    headers = explain(an_exchange(), Decided(dispatch, decision_s=12.4e-6), dispatch)
    assert headers == {
        "server": "sluice",
        "x-request-id": "client-id",
        "x-sluice-prefill": "p7",
        "x-sluice-decode": "d9",
        "x-sluice-decision-us": "12",
        "x-sluice-attempts": "1",
        "x-sluice-predicted-ttft-ms": "250.0",
        "x-sluice-predicted-tbt-ms": "50.0",
        "x-sluice-cached-tokens": "0",
    }


@pytest.mark.parametrize(
    ("reason", "failure", "status", "kind"),
    [
        (RejectReason.UNKNOWN_MODEL, None, 404, "not_found_error"),
        (RejectReason.PROMPT_TOO_LONG, None, 400, "invalid_request_error"),
        (RejectReason.QUEUE_FULL, None, 429, "rate_limit_error"),
        (RejectReason.NO_DECODE, None, 503, "service_unavailable_error"),
        (RejectReason.NO_DECODE, "decode_lost", 502, "engine_error"),
        (RejectReason.TOO_MANY_ATTEMPTS, "prefill_status_500", 502, "engine_error"),
        (RejectReason.TOO_MANY_ATTEMPTS, "decode_head_timeout", 504, "engine_timeout"),
        (RejectReason.WAITED_TOO_LONG, "decode_lost", 429, "rate_limit_error"),
    ],
)
async def test_a_refusal_becomes_its_status_and_says_what_failed(handlers, reason, failure, status, kind):
    reject = Reject("r1", reason, "no", retry_after_s=2.2)
    response = handlers.refused(reject, Retry("e1", failure) if failure else None, an_exchange())
    assert response.status == status
    assert f'"type":"{kind}"'.encode() in response.body
    assert response.headers["x-sluice-reason"] == reason
    assert ("retry-after" in response.headers) is (status in (429, 503))
    assert (failure is None) or status == 429 or failure.encode() in response.body


async def test_a_time_to_come_back_is_whole_seconds_rounded_up(handlers):
    for retry_after_s, said in ((2.2, "3"), (0.01, "1"), (None, "1")):
        reject = Reject("r1", RejectReason.QUEUE_FULL, "no", retry_after_s=retry_after_s)
        assert handlers.refused(reject, None, an_exchange()).headers["retry-after"] == said
