"""Ids go to an engine only where it takes them, and come from it only when they are ids."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from adapters.token_ids import parse_tokenize, tokenize_body, with_token_ids
from gateway.core.errors import MalformedEngineData

IDS = np.array([5, 6, 7], dtype=np.int32)
CHAT: dict[str, object] = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
TRANSFER: dict[str, object] = {"do_remote_prefill": True, "remote_port": 5600}


def test_a_chat_on_vllm_carries_them_beside_the_transfer_parameters() -> None:
    body = with_token_ids({**CHAT, "kv_transfer_params": TRANSFER}, IDS, "vllm")
    assert body["kv_transfer_params"] == {**TRANSFER, "prompt_token_ids": [5, 6, 7]}
    assert body["messages"] == CHAT["messages"]


def test_a_chat_on_sglang_carries_them_as_input_ids() -> None:
    assert with_token_ids(CHAT, IDS, "sglang") == {**CHAT, "input_ids": [5, 6, 7]}


@pytest.mark.parametrize("adapter", ["vllm", "sglang"])
def test_a_completion_is_asked_by_ids(adapter: str) -> None:
    assert with_token_ids({"prompt": "x", "n": 1}, IDS, adapter) == {"prompt": [5, 6, 7], "n": 1}


@pytest.mark.parametrize(
    "more",
    [
        {"echo": True},
        {"truncate_prompt_tokens": 2},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "uuid": "1"}]}]},
        {"messages": "x"},
    ],
)
@pytest.mark.parametrize("adapter", ["vllm", "sglang"])
def test_a_body_the_engine_must_read_itself_goes_as_it_is(more: dict[str, object], adapter: str) -> None:
    assert with_token_ids({**CHAT, **more}, IDS, adapter) == {**CHAT, **more}


@pytest.mark.parametrize("prompt", [["a", "b"], [1, 2], None])
def test_prompts_that_are_not_one_text_stay(prompt: object) -> None:
    assert with_token_ids({"prompt": prompt}, IDS, "vllm") == {"prompt": prompt}


def test_no_ids_and_unknown_engines_change_nothing() -> None:
    assert with_token_ids(CHAT, IDS[:0], "vllm") == CHAT
    assert with_token_ids(CHAT, IDS, "openai") == CHAT


def test_the_body_given_is_never_changed() -> None:
    body = {**CHAT, "kv_transfer_params": dict(TRANSFER)}
    before = copy.deepcopy(body)
    with_token_ids(body, IDS, "vllm")
    tokenize_body(body)
    assert body == before


def test_a_chat_is_asked_of_tokenize_with_what_its_template_sees() -> None:
    body = {**CHAT, "tools": [1], "documents": [2], "reasoning_effort": "none", "max_tokens": 5, "stream": True}
    assert tokenize_body(body) == {
        **CHAT,
        "tools": [1],
        "chat_template_kwargs": {"documents": [2], "reasoning_effort": "none", "enable_thinking": False},
    }


def test_a_completion_is_asked_of_tokenize_by_its_prompt() -> None:
    assert tokenize_body({"model": "m", "prompt": "x", "stream": True}) == {"model": "m", "prompt": "x"}


@pytest.mark.parametrize("body", [{}, {"prompt": ["a"]}, {"prompt": "x", "suffix": "y"}, {"messages": 3}])
def test_what_tokenize_cannot_tell_is_not_asked(body: dict[str, object]) -> None:
    assert tokenize_body(body) is None


def test_old_names_of_the_reasoning_are_brought_up_to_date() -> None:
    asked = tokenize_body({"messages": [{"role": "assistant", "content": "x", "reasoning_content": "y"}]})
    assert asked is not None
    assert asked["messages"] == [{"role": "assistant", "content": "x", "reasoning_content": "y", "reasoning": "y"}]


def test_an_answer_gives_ids() -> None:
    assert parse_tokenize(b'{"count":2,"max_model_len":8,"tokens":[1,2147483647]}').tolist() == [1, 2147483647]


@pytest.mark.parametrize("answer", [b"", b"{}", b'{"tokens":[1.5]}', b'{"tokens":[-1]}', b'{"tokens":[2147483648]}'])
def test_anything_else_is_malformed(answer: bytes) -> None:
    with pytest.raises(MalformedEngineData):
        parse_tokenize(answer)
