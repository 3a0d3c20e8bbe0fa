"""What is read out of an answer's bytes, with the clock in the test's hand."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.answer import AnswerRecord, ClientResult, ErrorKind
from tests.loadtest.scripted_server import DONE, event

BODY = b": hello\r\n\r\n" + event() + event("é1") + event("22") + b"event: ping\ndata:\n\n" + event("3") + DONE


class Clock:
    """A clock that is moved by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def record(clock: Clock | None = None, prompt_tokens: int = 0) -> AnswerRecord:
    return AnswerRecord(scheduled_at=99.0, prompt_tokens=prompt_tokens, clock=clock or Clock())


def read(*parts: bytes) -> ClientResult:
    answer = record()
    for part in parts:
        answer.feed(part)
    answer.end_of_stream()
    return answer.result()


def test_gaps_become_tpot_and_tbt_of_the_slowest_tenth() -> None:
    clock = Clock()
    answer = record(clock)
    for gap_s in (1.0, *[0.1] * 18, 0.5, 0.7):
        clock.now += gap_s
        answer.feed(event("x"))
    result = answer.result()
    assert result.first_token_at == 101.0
    assert result.tpot_s == pytest.approx((18 * 0.1 + 0.5 + 0.7) / 20)
    assert result.tbt_s == pytest.approx((0.5 + 0.7) / 2)


def test_one_token_has_no_gap() -> None:
    result = read(event("x"), DONE)
    assert (result.output_tokens, result.tpot_s, result.tbt_s) == (1, None, None)


def test_lag_and_latency_count_from_the_instant_it_was_due() -> None:
    answer = record()
    answer.feed(event("x"))
    result = answer.result()
    assert (result.lag_s, result.outcome.ttft_s, result.outcome.arrived_at) == (1.0, 1.0, 99.0)


@given(st.lists(st.integers(0, len(BODY))))
def test_any_split_of_the_bytes_gives_the_same_answer(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(BODY)]
    result = read(*(BODY[start:end] for start, end in pairwise(edges)))
    assert (result.error, result.text, result.output_tokens) == (None, "é1223", 3)


@given(st.binary(max_size=200))
def test_any_bytes_give_a_value_or_a_decode_error_and_never_a_clean_end_without_done(garbage: bytes) -> None:
    try:
        result = read(garbage)
    except ValueError:
        return
    assert result.error is ErrorKind.INCOMPLETE or b"[DONE]" in garbage


@pytest.mark.parametrize(
    "data",
    [
        b'data: {"choices":[{"delta":{"reasoning_content":"hm"}}]}\n',
        b'data: {"choices":[{"delta":{"tool_calls":[{"index":0}]}}]}\n',
        b'data: {"choices":[{"text":"plain completion"}]}\n',
    ],
)
def test_reasoning_tool_calls_and_plain_completions_are_tokens(data: bytes) -> None:
    assert read(data, DONE).output_tokens == 1


@pytest.mark.parametrize(
    "data",
    [
        b'data: {"object":"error","message":"boom","code":400}\n',
        b'event: error\ndata: {"error":"boom"}\n',
        b'data: {"choices":[{"delta":{},"finish_reason":"abort"}]}\n',
    ],
)
def test_engines_errors_inside_a_stream_are_found_in_every_disguise(data: bytes) -> None:
    assert read(event("x"), data, DONE).error is ErrorKind.STREAM_ERROR


def test_the_first_failure_is_the_one_that_counts() -> None:
    assert read(b'data: {"error":"boom"}\n').error is ErrorKind.STREAM_ERROR


def test_the_senders_count_of_prompt_tokens_goes_before_the_servers() -> None:
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":1}}\n'
    counts = []
    for prompt_tokens in (0, 5):
        answer = record(prompt_tokens=prompt_tokens)
        answer.feed(usage)
        counts.append(answer.result().prompt_tokens)
    assert counts == [9, 5]
