"""Synthetic prompts share exactly the prefixes that their block ids share."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.prompts import WORDS, synthesise
from loadtest.workload import BLOCK_TOKENS, TraceRequest, block_count


def prompt(*ids: int, tokens: int | None = None, characters_per_token: float = 4.0, salt: str = "") -> str:
    request = TraceRequest(0.0, tokens or BLOCK_TOKENS * max(1, len(ids)), 1, ids or None)
    return synthesise(request, characters_per_token=characters_per_token, salt=salt)


def test_the_vocabulary_has_64_different_words_of_four_letters() -> None:
    assert len(set(WORDS)) == 64
    assert {len(word) for word in WORDS} == {4}


@pytest.mark.parametrize("characters_per_token", [1.5, 4.0, 5.3])
def test_the_length_is_what_was_asked_for(characters_per_token: float) -> None:
    text = prompt(1, 2, 3, tokens=1100, characters_per_token=characters_per_token)
    assert len(text) == round(1100 * characters_per_token)


def test_shared_ids_give_a_shared_prefix_of_whole_blocks_and_no_more() -> None:
    first, second, shared = prompt(1, 2, 3), prompt(1, 2, 33), 2 * BLOCK_TOKENS * 4
    assert first[:shared] == second[:shared]
    assert first[shared : shared + 2] != second[shared : shared + 2]


def test_different_first_blocks_differ_from_the_first_word_on() -> None:
    assert prompt(1, 2).split()[0] != prompt(11, 2).split()[0]


def test_a_last_block_begins_like_the_whole_block_of_the_same_id() -> None:
    assert prompt(1, 2).startswith(prompt(1, 2, tokens=700))


def test_without_ids_only_the_very_same_request_repeats_and_salt_tells_equal_ones_apart() -> None:
    assert prompt() == prompt()
    assert prompt(tokens=500).split()[0] != prompt(tokens=501).split()[0]
    assert prompt(salt="1").split()[0] != prompt(salt="2").split()[0]


@given(
    st.lists(st.integers(0, 1 << 40), min_size=1, max_size=4),
    st.lists(st.integers(0, 1 << 40), min_size=1, max_size=4),
    st.integers(1, BLOCK_TOKENS),
)
def test_texts_are_equal_exactly_when_ids_are(first: list[int], second: list[int], last_tokens: int) -> None:
    texts = [prompt(*ids, tokens=BLOCK_TOKENS * (len(ids) - 1) + last_tokens) for ids in (first, second)]
    assert block_count(BLOCK_TOKENS * (len(first) - 1) + last_tokens) == len(first)
    assert (texts[0] == texts[1]) is (first == second)
