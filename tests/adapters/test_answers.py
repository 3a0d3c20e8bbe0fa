from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.answers import Usage, client_error_body, error_event, models_body, refusal, usage
from gateway.core.errors import BadRequest, EngineTimeout
from tests.adapters.transcripts import VLLM


def test_a_refusal_has_openai_s_shape():
    assert msgspec.json.decode(refusal(BadRequest("No.", param="n"))) == {
        "error": {"message": "No.", "type": "invalid_request_error", "param": "n", "code": 400}
    }


def test_a_failure_after_the_first_byte_is_one_error_event_and_the_end():
    event, end, rest = error_event(EngineTimeout("Late.")).split(b"\n\n")
    assert event.startswith(b'data: {"error":{')
    assert (end, rest) == (b"data: [DONE]", b"")


def test_the_model_list_is_sorted_and_dated_by_the_caller():
    listed = msgspec.json.decode(models_body({"b": None, "a": 8192}, created=5))
    assert [(entry["id"], entry["max_model_len"], entry["created"]) for entry in listed["data"]] == [
        ("a", 8192, 5),
        ("b", None, 5),
    ]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'{"usage":{"prompt_tokens":9,"completion_tokens":2}}', Usage(9, 2)),
        (b'{"usage":{"prompt_tokens":9,"prompt_tokens_details":{"cached_tokens":8}}}', Usage(9, None, 8)),
        (b'{"usage":{"input_tokens":9,"output_tokens":2,"input_tokens_details":{"cached_tokens":1}}}', Usage(9, 2, 1)),
        (b'{"type":"response.completed","response":{"usage":{"output_tokens":2}}}', Usage(None, 2)),
        (b'{"usage":null}', None),
        (b'{"usage":{"prompt_tokens":-1}}', None),
        (b"[DONE]", None),
    ],
)
def test_usage_is_read_where_an_engine_tells_it(data, expected):
    assert usage(data) == expected


def test_usage_of_a_recorded_answer():
    told = usage((VLLM / "prefill_chat.json").read_bytes())
    assert told == Usage(prompt_tokens=111, output_tokens=1, cached_tokens=0)


@given(st.binary())
def test_any_bytes_are_usage_or_none(data):
    assert usage(data) is None or isinstance(usage(data), Usage)


@pytest.mark.parametrize("body", [b"", b"<html>", b'{"error":"Unauthorized"}', b'{"detail":"Not Found"}', b"\xff"])
def test_an_error_in_another_shape_is_replaced(body):
    assert msgspec.json.decode(client_error_body(404, body))["error"]["code"] == 404
