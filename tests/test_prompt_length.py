from __future__ import annotations

import pytest

from adapters.base import Payload
from adapters.openai import CHAT
from gateway.prompt_length import MAX_MODELS, PromptLength


def a_payload(chars: int = 400, **fields: object) -> Payload:
    return Payload(**{"request_id": "r", "path": CHAT, "body": {}, "model": "m", "prompt_chars": chars, **fields})


def test_token_ids_are_counted_exactly():
    assert PromptLength(4.0).tokens(a_payload(0, prompt_tokens=17)) == 17


@pytest.mark.parametrize(("chars", "tokens"), [(0, 1), (1, 1), (4, 1), (5, 2), (400, 100)])
def test_text_is_estimated_from_its_characters_and_never_empty(chars, tokens):
    assert PromptLength(4.0).tokens(a_payload(chars)) == tokens


def test_what_engines_count_moves_the_estimate_of_that_model_only():
    lengths = PromptLength(4.0)
    for _ in range(500):
        lengths.observe(a_payload(200), 100)
    assert lengths.tokens(a_payload(200)) == pytest.approx(100, abs=1)
    assert lengths.tokens(a_payload(200, model="other")) == 50


def test_one_odd_prompt_hardly_matters():
    lengths = PromptLength(4.0)
    lengths.observe(a_payload(400), 400)
    assert 95 <= lengths.tokens(a_payload(400)) <= 105


@pytest.mark.parametrize(
    ("payload", "tokens"),
    [
        (a_payload(), None),
        (a_payload(), 0),
        (a_payload(0), 9),
        (a_payload(model=None), 9),
        (a_payload(path="/v1/responses"), 9),
    ],
    ids=["not told", "none", "token ids", "no model", "passed through"],
)
def test_what_says_nothing_of_text_teaches_nothing(payload, tokens):
    lengths = PromptLength(4.0)
    lengths.observe(payload, tokens)
    assert lengths.tokens(a_payload()) == 100


def test_invented_model_names_do_not_fill_the_memory():
    lengths = PromptLength(4.0)
    for number in range(MAX_MODELS + 50):
        lengths.observe(a_payload(100, model=f"m{number}"), 100)
    assert lengths.tokens(a_payload(400, model="m0")) > 100
    assert lengths.tokens(a_payload(400, model=f"m{MAX_MODELS + 1}")) == 100
