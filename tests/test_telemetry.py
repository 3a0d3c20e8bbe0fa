from __future__ import annotations

import random

import pytest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from gateway.config import TelemetrySettings
from gateway.core.errors import ConfigError
from gateway.records import Outcome
from gateway.telemetry import MAX_TEXT_CHARS, SpanMaker, span_count, span_export
from tests.builders import an_estimate
from tests.record_builders import a_record, an_attempt

MAKER = SpanMaker(Resource({}), InstrumentationScope("sluice"), lambda _: "vllm", random.Random(1))
ALONE = an_estimate("b1", "b1")
RECORDS = {
    "served": a_record(),
    "served by one engine": a_record(attempts=(an_attempt(estimate=ALONE, prefilled_at=None),)),
    "answered whole": a_record(attempts=(an_attempt(first_token_at=None),)),
    "waited": a_record(attempts=(an_attempt(sent_at=10.5),)),
    "refused": a_record(outcome=Outcome.REFUSED, attempts=(an_attempt(sent_at=None, ended_at=10.001),)),
    "refused after a wait": a_record(outcome=Outcome.REFUSED, attempts=(an_attempt(sent_at=None, ended_at=11.0),)),
    "retried": a_record(attempts=(an_attempt(prefilled_at=None, failure="prefill_lost"), an_attempt(number=2))),
    "left while it waited": a_record(attempts=(an_attempt(sent_at=None, ended_at=None),)),
    "unsound": a_record(attempts=(), gathered_at=None),
}


@pytest.mark.parametrize("name", RECORDS)
def test_what_is_dropped_is_counted_as_what_it_would_have_been(name):
    assert span_count(RECORDS[name]) == len(MAKER.spans(RECORDS[name]))


@pytest.mark.parametrize("name", RECORDS)
def test_every_value_is_bounded(name):
    for span in MAKER.spans(RECORDS[name]):
        for value in (span.attributes or {}).values():
            assert len(value if isinstance(value, str | tuple | list) else ()) <= MAX_TEXT_CHARS


def test_a_client_cannot_fill_spans_with_its_words():
    root, *_ = MAKER.spans(a_record(model="m" * 10_000, tenant="t" * 10_000, reason="r" * 10_000))
    lengths = {name: len(value) for name, value in root.attributes.items() if isinstance(value, str)}
    assert max(lengths.values()) == MAX_TEXT_CHARS
    assert len(root.name) <= MAX_TEXT_CHARS + 10


def test_instants_are_unix_nanoseconds():
    root, gather, *_ = MAKER.spans(a_record())
    assert (root.start_time, root.end_time) == (1010 * 10**9, 1012 * 10**9)
    assert gather.end_time == pytest.approx(1010.001 * 1e9, abs=1000)


def test_no_collector_no_thread():
    assert span_export(TelemetrySettings(), "1", lambda _: None) is None


def test_an_address_without_a_host_is_refused():
    with pytest.raises(ConfigError, match=r"telemetry\.endpoint"):
        span_export(TelemetrySettings(endpoint="http:///v1/traces"), "1", lambda _: None)
