from __future__ import annotations

from contextlib import suppress

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.openai import CHAT, COMPLETIONS, parse
from gateway.core.errors import BadRequest
from tests.adapters.transcripts import VLLM

MESSAGES = [{"role": "user", "content": "hello"}]


def chat(**fields):
    return parse(CHAT, msgspec.json.encode({"model": "m", "messages": MESSAGES} | fields), request_id="r")


def completion(**fields):
    return parse(COMPLETIONS, msgspec.json.encode({"model": "m", "prompt": "hello"} | fields), request_id="r")


def test_a_chat_request_gives_what_routing_needs():
    request = chat(stream=True, max_tokens=7)
    assert (request.model, request.is_stream, request.max_output_tokens) == ("m", True, 7)
    assert (request.prompt_chars, request.prompt_tokens, request.can_hand_off) == (5, None, True)


def test_unknown_fields_pass_through_untouched():
    odd = {"seed": 2**63 - 1, "temperature": 1e-7, "new_field": {"x": [None, 2**64]}}
    assert {name: chat(**odd).body[name] for name in odd} == odd


def test_max_completion_tokens_beats_max_tokens():
    assert chat(max_tokens=7, max_completion_tokens=9).max_output_tokens == 9


def test_a_completion_that_does_not_say_gets_sixteen_tokens():
    assert completion().max_output_tokens == 16
    assert completion(max_tokens=None).max_output_tokens == 16
    assert chat().max_output_tokens is None


@pytest.mark.parametrize(
    ("prompt", "chars", "tokens", "can_hand_off"),
    [
        ("abc", 3, None, True),
        (["abc"], 3, None, True),
        (["abc", "de"], 5, None, False),
        ([1, 2, 3, 4], 0, 4, True),
        ([[1, 2]], 0, 2, True),
        ([[1, 2], [3]], 0, 3, False),
    ],
)
def test_every_prompt_form_is_measured(prompt, chars, tokens, can_hand_off):
    request = completion(prompt=prompt)
    assert (request.prompt_chars, request.prompt_tokens, request.can_hand_off) == (chars, tokens, can_hand_off)


def test_chat_text_is_counted_in_parts_tools_and_tool_calls_but_not_in_media():
    parts = [{"type": "text", "text": "abcd"}, {"type": "image_url", "image_url": {"url": "data:" + "x" * 999}}]
    assert chat(messages=[{"role": "user", "content": parts}]).prompt_chars == 4
    assert chat(messages=[{"role": "assistant", "content": None, "tool_calls": [{}]}]).prompt_chars == 4
    assert chat(tools=[{}]).prompt_chars == 5 + 4


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2},
        {"best_of": 2},
        {"use_beam_search": True},
        {"prompt_logprobs": 0},
        {"echo": True, "logprobs": 1},
        {"echo": True, "max_tokens": 0},
        {"prompt": None, "prompt_embeds": "AAAA"},
    ],
)
def test_requests_whose_kv_cannot_be_moved_once_stay_on_one_engine(fields):
    assert not completion(**fields).can_hand_off


@pytest.mark.parametrize("fields", [{"n": 1}, {"n": None}, {"best_of": 1}, {"echo": True}, {"logprobs": 5}])
def test_harmless_settings_still_hand_off(fields):
    assert completion(**fields).can_hand_off


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": 7}, "model"),
        ({"model": ""}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": [1]}, "stream_options"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 2**63}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"n": 0}, "n"),
        ({"n": "2"}, "n"),
    ],
)
def test_a_wrong_chat_field_is_named(fields, param):
    with pytest.raises(BadRequest) as caught:
        chat(**fields)
    assert caught.value.param == param
    assert param.split("[")[0] in caught.value.message


@pytest.mark.parametrize("prompt", ["", [], [""], ["a", ""], [[]], [1, "a"], [[1], "a"], [-1], [[-1]], {}, 7, [True]])
def test_a_wrong_prompt_is_named(prompt):
    with pytest.raises(BadRequest) as caught:
        completion(prompt=prompt)
    assert caught.value.param.startswith("prompt")


@pytest.mark.parametrize("name", ["model", "messages"])
def test_a_missing_chat_field_is_named(name):
    body = {"model": "m", "messages": MESSAGES}
    del body[name]
    with pytest.raises(BadRequest) as caught:
        parse(CHAT, msgspec.json.encode(body), request_id="r")
    assert caught.value.param == name


def test_a_missing_prompt_is_named():
    with pytest.raises(BadRequest) as caught:
        parse(COMPLETIONS, b'{"model":"m"}', request_id="r")
    assert caught.value.param == "prompt"


def test_no_output_is_allowed_only_with_echo():
    with pytest.raises(BadRequest):
        completion(max_tokens=0)
    assert completion(max_tokens=0, echo=True).max_output_tokens == 0


def test_the_client_s_internal_headers_do_not_travel():
    raw = msgspec.json.encode({"model": "m", "messages": MESSAGES})
    request = parse(CHAT, raw, [("X-Request-Id", "theirs"), ("traceparent", "00")], request_id="ours")
    assert (request.request_id, request.headers) == ("ours", (("traceparent", "00"),))


def test_a_route_that_is_passed_through_needs_only_an_object():
    request = parse("/tokenize", b'{"prompt":"hello","rid":"x"}', request_id="r")
    assert (request.model, request.can_hand_off, request.body) == (None, False, {"prompt": "hello"})
    assert parse("/v1/responses", b'{"model":"m","max_output_tokens":5}', request_id="r").max_output_tokens == 5
    assert parse("/v1/messages", b'{"model":"m","max_tokens":"?"}', request_id="r").max_output_tokens is None


def test_what_a_real_engine_served_is_accepted():
    recorded = msgspec.json.decode((VLLM / "exchanges.json").read_bytes()).values()
    served = [one for one in recorded if one["status"] == 200 and one["request"] and one["path"] in (CHAT, COMPLETIONS)]
    assert len(served) > 9
    for one in served:
        kept = {name: value for name, value in one["request"].items() if name != "kv_transfer_params"}
        assert parse(one["path"], msgspec.json.encode(one["request"]), request_id="r").body == kept


_SCALARS = st.sampled_from([None, True, False, -1, 0, 1, 2**63, 2**70, 1.5, -0.0, "", "a", "\x00", "\U0001f600"])
_JSON = _SCALARS | st.lists(_SCALARS | st.lists(_SCALARS, max_size=3), max_size=3) | st.just({"content": ["a", 1]})
_NAMES = st.sampled_from(["model", "messages", "prompt", "stream", "n", "max_tokens", "echo", "vllm_xargs", "tools"])


@given(st.sampled_from([CHAT, COMPLETIONS, "/v1/responses"]), st.binary() | st.dictionaries(_NAMES, _JSON))
def test_any_body_gives_a_payload_or_a_bad_request(path, body):
    raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
    with suppress(BadRequest):
        request = parse(path, raw, request_id="r")
        assert msgspec.json.decode(msgspec.json.encode(request.body)) == request.body
        assert request.prompt_chars >= 0
