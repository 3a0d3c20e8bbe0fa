from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace.sampling import TraceIdRatioBased
from opentelemetry.trace import get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from gateway.trace_context import Ids, Parent, parse, render, with_parent

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = Parent(int(TRACE, 16), int(CALLER, 16), is_sampled=True)


def read_by_opentelemetry(value: str) -> tuple[int, int, bool] | None:
    context = get_current_span(TraceContextTextMapPropagator().extract({"traceparent": value})).get_span_context()
    return (context.trace_id, context.span_id, context.trace_flags.sampled) if context.is_valid else None


@pytest.mark.parametrize(
    "value",
    [
        f"00-{TRACE}-{CALLER}-01",
        f"00-{TRACE}-{CALLER}-00",
        f"00-{TRACE}-{CALLER}-03",
        f"01-{TRACE}-{CALLER}-01",
        f"cc-{TRACE}-{CALLER}-01-what-the-future-will-be-like",
        f"00-{TRACE}-{CALLER}-01-more",
        f"ff-{TRACE}-{CALLER}-01",
        f"00-{'0' * 32}-{CALLER}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{CALLER}-01",
        f"00-{TRACE}-{CALLER}",
        f"00-{TRACE[:-1]}-{CALLER}-01",
        "",
        "-",
    ],
)
def test_a_caller_is_read_as_opentelemetry_reads_it(value):
    parent = parse([("Traceparent", value)])
    told = None if parent is None else (parent.trace_id, parent.span_id, parent.is_sampled)
    assert told == read_by_opentelemetry(value)


@given(st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1), st.booleans())
def test_what_is_written_is_read_back_by_both(trace_id, span_id, is_sampled):
    trace = Ids(sample_ratio=0.0, rng=random.Random(1)).trace(Parent(trace_id, 7, is_sampled))
    written = render(trace, span_id)
    assert parse([("traceparent", written)]) == Parent(trace_id, span_id, is_sampled)
    assert read_by_opentelemetry(written) == (trace_id, span_id, is_sampled)


@given(st.integers(1, 2**128 - 1), st.floats(0, 1))
def test_a_trace_is_sampled_when_opentelemetry_would_sample_it(trace_id, ratio):
    theirs = TraceIdRatioBased(ratio).should_sample(None, trace_id, "x").decision.is_sampled()
    assert Ids(sample_ratio=ratio, rng=random.Random(1)).samples(trace_id) is theirs


def test_the_caller_decides_what_is_recorded():
    ids = Ids(sample_ratio=1.0, rng=random.Random(1))
    assert ids.trace(None).is_sampled
    assert not ids.trace(Parent(1, 2, is_sampled=False)).is_sampled
    assert Ids(sample_ratio=0.0, rng=random.Random(1)).trace(PARENT).is_sampled


def test_two_callers_are_no_caller_and_states_of_several_headers_are_one():
    value = f"00-{TRACE}-{CALLER}-01"
    assert parse([("traceparent", value), ("traceparent", value)]) is None
    parent = parse([("tracestate", "a=1"), ("traceparent", value), ("Tracestate", "b=2")])
    assert parent is not None
    assert parent.tracestate == "a=1,b=2"
    long = parse([("traceparent", value), ("tracestate", "a=" + "x" * 600)])
    assert long is not None
    assert long.tracestate == ""


def test_an_engine_is_told_our_span_and_nothing_of_an_unsound_caller():
    trace = Ids(sample_ratio=1.0, rng=random.Random(1)).trace(None)
    headers = (("Traceparent", "nonsense"), ("tracestate", "a=1"), ("x", "y"))
    assert with_parent(headers, trace, 5) == (("x", "y"), ("traceparent", render(trace, 5)))
