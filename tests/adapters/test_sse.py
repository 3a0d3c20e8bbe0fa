from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from adapters.sse import EventCounter, first_event
from gateway.core.errors import MalformedEngineData
from tests.adapters.transcripts import VLLM


def outcome(*chunks, limit=1 << 20):
    """What a counter knows at the end: events, last data, done, error; None when an event was too long."""
    counter = EventCounter(limit)
    try:
        count = sum(counter.feed(chunk) for chunk in chunks)
    except MalformedEngineData:
        return None
    return count, counter.last_data, counter.is_done, counter.is_error


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        (b"", (0, b"", False, False)),
        (b"data: a\n\n", (1, b"a", False, False)),
        (b"data:a\n\n", (1, b"a", False, False)),
        (b"data: a\n\ndata: b\n\n", (2, b"b", False, False)),
        (b"data: a\r\n\r\ndata: b\r\r", (2, b"b", False, False)),
        (b"data: a\ndata: b\n\n", (1, b"a\nb", False, False)),
        (b": keep-alive\n\ndata: a\n\n", (1, b"a", False, False)),
        (b"data: a\n\n: keep-alive\n\n", (1, b"a", False, False)),
        (b"event: message\ndata: a\nid: 7\n\n", (1, b"a", False, False)),
        (b"data: a\n\n\n\ndata: b\n\n", (2, b"b", False, False)),
        (b"event: ping\n\n", (0, b"", False, False)),
        (b"data\n\n", (1, b"", False, False)),
        (b"data: a\n\ndata: [DONE]\n\n", (1, b"a", True, False)),
        (b'data: a\n\ndata: {"error": 1}\n\ndata: [DONE]\n\n', (1, b"a", True, True)),
        (b"event: error\ndata: {}\n\ndata: a\n\n", (1, b"a", False, True)),
        (b'data: says [DONE] and {"error"\n\n', (1, b'says [DONE] and {"error"', False, False)),
        (b"data: a\n\ndata: b", (1, b"a", False, False)),
        (b"data: a\n", (0, b"", False, False)),
    ],
)
def test_events_are_counted_by_their_framing_however_the_bytes_are_split(stream, expected):
    assert outcome(stream) == expected
    assert outcome(*(stream[at : at + 1] for at in range(len(stream)))) == expected
    for at in range(len(stream)):
        assert outcome(stream[:at], stream[at:]) == expected


_PIECES = st.sampled_from(
    [b"data: x", b"data:", b"data", b'data: {"error"', b"data: [DONE]", b"event: error", b": c", b"\n", b"\r", b"\n\n"]
)


@given(st.lists(_PIECES, max_size=14).map(b"".join), st.lists(st.integers(0, 90), max_size=4), st.sampled_from([9, 99]))
@example(b"event: error\ndata: x\n\n", [13], 99)
@example(b": long comment\ndata: x\n\n", [5], 9)
def test_any_split_gives_the_same_result(stream, cuts, limit):
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    chunks = [stream[start:end] for start, end in pairwise(edges)]
    assert outcome(*chunks, limit=limit) == outcome(stream, limit=limit)


def test_an_event_over_the_limit_is_an_error_before_it_is_whole():
    counter = EventCounter(max_event_bytes=10)
    assert counter.feed(b"data: 1234") == 0
    with pytest.raises(MalformedEngineData):
        counter.feed(b"5")


def test_many_events_under_the_limit_never_add_up():
    assert outcome(*[b"data: 1\n\n"] * 99, b": comment\n" * 99, limit=10)[0] == 99


@pytest.mark.parametrize("name", ["chat.sse", "chat_usage.sse", "completion.sse", "decode_chat.sse"])
def test_recorded_streams_end_with_done_and_their_events_are_counted(name):
    stream = (VLLM / name).read_bytes()
    count, last, is_done, is_error = outcome(stream)
    assert count == stream.count(b"data: ") - 1
    assert last.startswith(b"{")
    assert (is_done, is_error) == (True, False)


def test_the_usage_chunk_of_a_recorded_stream_is_the_last_data():
    assert b'"usage":{' in outcome((VLLM / "chat_usage.sse").read_bytes())[1]


@pytest.mark.parametrize(
    ("buffer", "expected"),
    [
        (b"", (None, 0)),
        (b"data: a\n", (None, 0)),
        (b": keep-alive\n\n", (None, 0)),
        (b"data: a\n\nrest", (b"a", 9)),
        (b": keep-alive\n\nevent: x\r\ndata: a\r\n\r\nrest", (b"a", 35)),
        (b"data: a\ndata: b\n\n", (b"a\nb", 17)),
        (b"data: [DONE]\n\n", (b"[DONE]", 14)),
    ],
)
def test_the_first_event_is_found_with_its_end(buffer, expected):
    assert first_event(buffer) == expected


@given(st.lists(_PIECES, max_size=14).map(b"".join))
def test_walking_by_first_events_sees_what_the_counter_sees(stream):
    seen, rest = [], stream
    while (found := first_event(rest))[0] is not None:
        seen.append(found[0])
        rest = rest[found[1] :]
    plain = [data for data in seen if data != b"[DONE]" and not data.startswith(b'{"error"')]
    count, _, is_done, is_error = outcome(stream)
    assert count == len(plain) or is_error
    assert is_done == (b"[DONE]" in seen)
