"""What a broken stream has said, the request for the rest, and how the rest is made to look."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.continuation import (
    Rewriting,
    Said,
    asking_for_ids,
    can_continue,
    closing_events,
    hide_token_ids,
    rest_of,
    said_in,
    without_half_characters,
)
from adapters.openai import COMPLETIONS
from loadtest import tokenizer
from tests.adapters.transcripts import VLLM, payload

NAMES = {"id": "chatcmpl-1", "created": 5, "model": "m"}


def event(text=None, ids=None, *, role=None, finish=None, **more):
    delta = {name: value for name, value in (("role", role), ("content", text)) if value is not None}
    choice = {"index": 0, "delta": delta, "finish_reason": finish, "token_ids": ids}
    return b"data: " + msgspec.json.encode(NAMES | {"choices": [choice | more]}) + b"\n\n"


def completion(text, ids=None, prompt_ids=None):
    choice = {"index": 0, "text": text, "finish_reason": None, "token_ids": ids, "prompt_token_ids": prompt_ids}
    return b"data: " + msgspec.json.encode(NAMES | {"choices": [choice]}) + b"\n\n"


def asks(path=None, **fields):
    if path == COMPLETIONS:
        return payload(path=path, **({"prompt": "hi", "messages": None} | fields))
    return payload(**({} if path is None else {"path": path}), **fields)


# ---- which requests --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, True),
        ({"temperature": 1.0}, True),
        ({"temperature": 0, "max_tokens": 9, "stream_options": {"include_usage": True}}, True),
        ({"stop": [], "tools": None, "logprobs": False, "repetition_penalty": 1.0, "presence_penalty": 0}, True),
        ({"stream": False}, False),
        ({"seed": 1}, False),
        ({"seed": 0}, False),
        ({"n": 2}, False),
        ({"stop": ["x"]}, False),
        ({"logprobs": True}, False),
        ({"tools": [{"type": "function"}]}, False),
        ({"response_format": {"type": "json_object"}}, False),
        ({"frequency_penalty": 0.1}, False),
        ({"repetition_penalty": 1.2}, False),
        ({"path": COMPLETIONS}, True),
        ({"path": COMPLETIONS, "echo": True}, False),
        ({"path": "/v1/responses"}, False),
    ],
)
def test_a_streamed_text_of_one_choice_can_be_continued(fields, expected):
    assert can_continue(asks(**fields)) is expected


# ---- what was said ---------------------------------------------------------------------------------------------------


def test_a_chat_says_its_text_its_names_and_its_ids():
    raw = event("", role="assistant") + event("Hi", [4]) + event(" you", [5, 6])
    said = said_in(raw)
    assert (said.text, said.token_ids, said.tokens, said.id) == ("Hi you", (4, 5, 6), 3, "chatcmpl-1")


def test_tokens_of_half_a_character_are_not_said_yet():
    assert said_in(event("a", [1]) + event("", [2])).token_ids == (1,)
    assert said_in(event("a", [1]) + event("", [2]) + event("é", [3])).token_ids == (1, 2, 3)


@pytest.mark.parametrize(
    ("events", "kept"),
    [
        ([("ab", [97, 98])], (97, 98)),
        ([("a", [97]), ("b", [98, 0xC3])], (97, 98)),
        ([("a", [97]), ("b", [98, 0xE2, 0x82])], (97, 98)),
        ([("a", [97]), ("b", [98, 0xC3]), ("éc", [0xA9, 99])], (97, 98, 0xC3, 0xA9, 99)),
        ([("a", [97]), ("", [0xE2]), ("€", [0x82, 0xAC, 0xC3])], (97, 0xE2, 0x82, 0xAC)),
        ([("a", [97]), ("b", [98, 0xC3]), ("é", [0xA9])], (97, 98, 0xC3, 0xA9)),
        ([("a", [97]), ("b", [98, 0xC3]), ("", [0xA9])], (97, 98)),
    ],
    ids=str,
)
async def test_a_half_character_at_the_end_of_a_merged_event_is_not_said_yet(events, kept):
    """vLLM joins the events of a client that is behind: the ids of such an event may go further than its text."""

    async def text_of(ids):
        return tokenizer.decode(ids)

    said = await without_half_characters(said_in(b"".join(event(text, ids) for text, ids in events)), text_of)
    assert (said.token_ids, said.unsure) == (kept, 0)
    assert tokenizer.decode(kept) == said.text


async def test_what_came_token_by_token_is_not_asked_about():
    async def text_of(ids):
        raise AssertionError(ids)

    said = said_in(event("a", [97]) + event("b", [98]) + event("", [0xC3]))
    assert (await without_half_characters(said, text_of)).token_ids == (97, 98)


@pytest.mark.parametrize("told", [None, "\ufffd"])
async def test_without_an_answer_about_a_merged_event_only_its_text_is_used(told):
    async def text_of(ids):
        return told

    said = await without_half_characters(said_in(event("a", [97]) + event("b", [98, 0xC3])), text_of)
    assert (said.token_ids, said.text, said.tokens) == (None, "ab", 3)


def test_without_ids_the_events_with_text_are_counted():
    said = said_in(event("", role="assistant") + event("a") + event("") + event("b"))
    assert (said.token_ids, said.tokens, said.text) == (None, 2, "ab")


def test_a_completion_tells_the_prompt_with_its_first_token():
    said = said_in(completion("a", [7], [1, 2]) + completion("b", [8]))
    assert (said.prompt_ids, said.token_ids) == ((1, 2), (7, 8))


@pytest.mark.parametrize("more", [{"tool_calls": [{}]}, {"reasoning_content": "hm"}, {"refusal": "no"}])
def test_what_is_more_than_text_is_known(more):
    assert not said_in(event("a", [1]) + event(delta=more)).is_only_text


def test_recorded_streams_are_understood():
    said = said_in((VLLM / "decode_chat.sse").read_bytes())
    assert said.is_only_text
    assert said.finish_reason == "length"
    assert said.text


@given(st.binary())
def test_any_bytes_are_something_said(raw):
    said_in(raw)
    said_in(b"data: " + raw + b"\n\n")


# ---- the rest --------------------------------------------------------------------------------------------------------

SAID = Said("c", 5, "m", "Hi you", (4, 5, 6), (1, 2), 3)


def test_a_chat_goes_on_from_its_token_ids_and_with_fewer_tokens():
    rest = rest_of(asks(max_tokens=10, min_tokens=5), SAID)
    assert rest.token_ids.tolist() == [1, 2, 4, 5, 6]
    assert (rest.body["max_tokens"], rest.body["min_tokens"], rest.max_output_tokens) == (7, 2, 7)
    assert rest.body["messages"] == [{"role": "user", "content": "hi"}]


def test_ids_that_the_gateway_knew_serve_where_the_engine_told_none_of_the_prompt():
    known = replace(asks(), token_ids=np.array([9, 9], dtype=np.int32))
    assert rest_of(known, replace(SAID, prompt_ids=None)).token_ids.tolist() == [9, 9, 4, 5, 6]


def test_a_chat_without_ids_goes_on_from_the_assistants_own_words():
    rest = rest_of(asks(), replace(SAID, token_ids=None))
    assert rest.body["messages"][1:] == [{"role": "assistant", "content": "Hi you"}]
    assert (rest.body["continue_final_message"], rest.body["add_generation_prompt"]) == (True, False)


def test_a_chat_that_already_continued_a_message_continues_it_further():
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well, "}]
    request = asks(messages=messages, continue_final_message=True, add_generation_prompt=False)
    rest = rest_of(request, replace(SAID, token_ids=None))
    assert rest.body["messages"][1] == {"role": "assistant", "content": "Well, Hi you"}


def test_media_is_read_again_by_the_engine_so_its_ids_are_not_used():
    picture = [{"type": "image_url", "image_url": {"url": "data:,"}}]
    rest = rest_of(asks(messages=[{"role": "user", "content": picture}]), SAID)
    assert rest.token_ids is None
    assert rest.body["messages"][1]["content"] == "Hi you"


def test_a_completion_goes_on_from_ids_or_from_text():
    assert rest_of(asks(COMPLETIONS), SAID).body["prompt"] == [1, 2, 4, 5, 6]
    assert rest_of(asks(COMPLETIONS), replace(SAID, token_ids=None)).body["prompt"] == "hiHi you"
    by_ids = asks(COMPLETIONS, prompt=[1, 2])
    assert rest_of(by_ids, SAID).body["prompt"] == [1, 2, 4, 5, 6]
    assert rest_of(by_ids, replace(SAID, token_ids=None)) is None


def test_a_completion_that_gave_no_limit_has_the_engines_less_what_was_said():
    assert rest_of(asks(COMPLETIONS), SAID).body["max_tokens"] == 13


def test_nothing_is_asked_for_when_nothing_is_left_or_it_was_more_than_text():
    assert rest_of(asks(max_tokens=3), SAID) is None
    assert rest_of(asks(), replace(SAID, is_only_text=False)) is None


# ---- how it looks ----------------------------------------------------------------------------------------------------


def rewritten(raw, prompt_tokens=2, shows_ids=False):
    data = Rewriting(SAID, prompt_tokens, shows_ids).event(raw[6:-2])
    return None if data is None else msgspec.json.decode(data)


def test_an_event_of_the_rest_bears_the_first_streams_names_and_no_role():
    shown = rewritten(event("b", [7]))
    assert (shown["id"], shown["created"], shown["choices"][0]["token_ids"]) == ("c", 5, None)
    assert rewritten(event("b", [7]), shows_ids=True)["choices"][0]["token_ids"] == [7]
    assert rewritten(event("", role="assistant")) is None
    assert rewritten(event("b", role="assistant"))["choices"][0]["delta"] == {"content": "b"}
    assert rewritten(completion("b", [7], [1, 2, 4]))["choices"][0]["prompt_token_ids"] is None


@pytest.mark.parametrize("prompt_tokens", [2, None])
def test_the_usage_is_that_of_one_engine(prompt_tokens):
    usage = {"prompt_tokens": 5, "total_tokens": 12, "completion_tokens": 7}
    raw = b"data: " + msgspec.json.encode(NAMES | {"choices": [], "usage": usage}) + b"\n\n"
    shown = rewritten(raw, prompt_tokens)
    assert shown["usage"] == {"prompt_tokens": 2, "total_tokens": 12, "completion_tokens": 10}


@given(st.binary() | st.sampled_from([b'{"choices":7}', b'{"choices":[7]}', b'{"choices":[{"delta":7}],"usage":{}}']))
def test_whatever_an_engine_sends_rewriting_it_does_not_fail(data):
    Rewriting(SAID, 2, False).event(data)


def test_ids_that_nobody_asked_for_are_hidden_and_texts_that_look_like_them_are_not():
    text = 'a "token_ids":[1] b'
    raw = event(text, [4, 5]) + completion(text, [6], [1, 2])
    assert hide_token_ids(raw) == event(text) + completion(text)
    assert asking_for_ids(asks()).body["return_token_ids"] is True


def test_a_stream_that_broke_after_its_last_token_is_closed_as_its_engine_would_have():
    assert closing_events(SAID, asks(), 2) == b"data: [DONE]\n\n"
    counted = asks(stream_options={"include_usage": True})
    usage, end = closing_events(SAID, counted, 2).split(b"\n\n")[:2]
    assert msgspec.json.decode(usage[6:])["usage"] == {"prompt_tokens": 2, "total_tokens": 5, "completion_tokens": 3}
    assert end == b"data: [DONE]"
    assert closing_events(SAID, counted, None) is None
