"""The tokenizer of emulated engines."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from loadtest.tokenizer import VOCABULARY_SIZE, WORDS, decode, encode, encode_chat


@given(st.text())
def test_text_comes_back_from_its_tokens(text: str) -> None:
    ids = encode(text)
    assert decode(ids) == text
    assert all(0 <= token < VOCABULARY_SIZE < 2**31 for token in ids)


def test_english_has_about_three_characters_a_token() -> None:
    text = "A sluice is a water channel controlled at its head by a gate."
    assert 2.5 < len(text) / len(encode(text)) < 4


@given(st.lists(st.text(max_size=20), min_size=1, max_size=5))
def test_a_longer_chat_starts_with_the_tokens_of_the_shorter_one(turns: list[str]) -> None:
    messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": turn} for i, turn in enumerate(turns)]
    whole = encode_chat(messages)
    assert whole[: len(encode_chat(messages[:-1])) - 1] == encode_chat(messages[:-1])[:-1]


def test_content_parts_count_as_their_text() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "a b"}, {"type": "text", "text": " c"}]}]
    assert encode_chat(parts) == encode_chat([{"role": "user", "content": "a b c"}])


def test_ids_outside_the_vocabulary_decode_to_nothing() -> None:
    assert decode([-1, VOCABULARY_SIZE]) == ""


def test_every_word_an_emulated_model_says_is_one_token() -> None:
    assert all(encode(decode([word])) == [word] for word in WORDS)
