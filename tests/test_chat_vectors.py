"""What vLLM's own front end made of these bodies (tests/recorded/record_chat_vectors.py) is what we make of them."""

import json
from pathlib import Path

import pytest

from gateway.chat_messages import NotRenderable
from gateway.model_tokenizer import ModelTokenizer

RECORDED = Path(__file__).parent / "recorded"
VECTORS = json.loads((RECORDED / "chat_vectors.json").read_text())
TOKENIZERS = {name: ModelTokenizer.load(RECORDED / "models" / name) for name in ("qwen", "llama3", "sentencepiece")}


def ids(vector: dict) -> list[int] | None:
    tokenizer, body = TOKENIZERS[vector["model"]], vector["body"]
    try:
        if "prompt" in body:
            return tokenizer.text_ids(body["prompt"], body, lambda: False).tolist()
        return tokenizer.chat_ids(body, lambda: False).tolist()
    except NotRenderable:
        return None


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: f"{vector['model']}: {vector['title']}")
def test_a_body_gives_the_token_ids_that_vllm_makes_of_it(vector: dict) -> None:
    assert ids(vector) == vector["ids"]


def test_the_recording_has_prompts_that_are_refused_and_many_that_are_not() -> None:
    refused = [vector for vector in VECTORS if vector["ids"] is None]
    assert 0 < len(refused) < len(VECTORS) / 4


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_body_is_not_changed_by_rendering_it(name: str) -> None:
    for vector in (vector for vector in VECTORS if vector["model"] == name):
        before = json.dumps(vector["body"])
        ids(vector)
        assert json.dumps(vector["body"]) == before
