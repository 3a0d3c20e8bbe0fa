"""Texts encoded in parts give the tokens of the whole, whatever the tokenizer and wherever the text is cut."""

from __future__ import annotations

from functools import cache
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway import token_cuts
from gateway.model_tokenizer import ModelTokenizer
from gateway.token_cuts import AddedTokenFacts, Cuts
from tests.token_builders import KINDS, MARKERS, WORDS, loaded

WITHOUT_WORD_CUTS = {
    "byte level, flagged tokens",
    "metaspace without split, first",
    "metaspace without split, always",
    "llama 2",
    "Unigram, stripped",
}

PIECES = [
    *WORDS,
    *MARKERS,
    "<mask>",
    "<r>",
    "word",
    "lone",
    "<<",
    "<|im",
    "<|im_",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "\u00a0",
]
PIECES += [
    "'s",
    ".",
    ",",
    "\u0301",
    "a\u0308",
    "\ufb01",
    "\u1e9b\u0323",
    "🙂\u200d🙂",
    "\x00",
    "\u2003",
    "İ",
    "ß",
    "▁",
    "Ġ",
    "[CLS]",
]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=60).map("".join) | st.lists(
    st.sampled_from([*WORDS, *MARKERS, "lone", "word"]), max_size=60
).map(" ".join)


@cache
def tokenizer(kind: str) -> ModelTokenizer:
    with TemporaryDirectory() as folder:
        return loaded(KINDS[kind](), Path(folder))


@pytest.fixture(autouse=True)
def _cut_wherever_it_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cuts, "TARGET_CHARS", 1)
    monkeypatch.setattr(token_cuts, "LONGEST_CHARS", 2)


def whole(model: ModelTokenizer, text: str, *, add_special_tokens: bool = False) -> list[int]:
    return model._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adds", [False, True])
def test_parts_encode_to_the_tokens_of_the_whole_text(kind: str, adds: bool) -> None:
    @settings(max_examples=60, deadline=None)
    @given(TEXTS)
    def check(text: str) -> None:
        model = tokenizer(kind)
        assert "".join(model.cuts.parts(text)) == text
        assert model.encode(text, add_special_tokens=adds).tolist() == whole(model, text, add_special_tokens=adds)

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_cut_at_markers_and_between_words_only_where_that_is_proved(kind: str) -> None:
    cuts = tokenizer(kind).cuts
    parts_count = len(list(cuts.parts("ab<|im_start|>cd<|im_start|>ef")))
    assert parts_count == (1 if kind == "byte level, overlapping tokens" else 3)
    assert cuts.cuts_words == (kind not in WITHOUT_WORD_CUTS)
    assert (len(list(cuts.parts("ab cd ef gh"))) > 1) == cuts.cuts_words


@settings(max_examples=60, deadline=None)
@given(TEXTS, TEXTS)
def test_a_text_that_grows_is_cut_at_the_same_places_but_for_its_last_part(text: str, more: str) -> None:
    cuts = tokenizer("byte level, pattern 0").cuts
    # A marker may be completed by what follows, and a word gap by the next letter: the end is not settled yet.
    ends = set(accumulate(map(len, cuts.parts(text))))
    grown = set(accumulate(map(len, cuts.parts(text + more))))
    settled = max((end for end in ends if end < len(text)), default=0)
    assert {end for end in ends if end <= settled} <= grown


def marks(*tokens: AddedTokenFacts) -> bool:
    return Cuts(tokens, None, None).has_markers


def test_an_added_token_that_reaches_beyond_its_own_text_is_no_marker() -> None:
    assert marks(AddedTokenFacts("<|end|>"))
    assert marks(AddedTokenFacts("<|end|>", strips_right=True))
    for facts in ({"strips_left": True}, {"is_single_word": True}, {"is_normalized": True}):
        assert not marks(AddedTokenFacts("<|end|>", **facts))
    assert not marks(AddedTokenFacts("end"))


def test_a_marker_that_another_token_can_overlap_is_none() -> None:
    overlapping = AddedTokenFacts("x<|", is_normalized=True)
    assert not marks(AddedTokenFacts("<|end|>"), overlapping)
    assert not marks(AddedTokenFacts("<<"))


def test_a_description_that_is_not_understood_forbids_cuts_between_words() -> None:
    byte_level = {"type": "ByteLevel", "use_regex": True}
    assert Cuts([], None, byte_level).cuts_words
    assert not Cuts([], {"type": "Unheard"}, byte_level).cuts_words
    for unknown in ("text", {"type": "Split", "pattern": {"Regex": "a b"}}, {"type": "Sequence", "pretokenizers": [3]}):
        assert not Cuts([], None, unknown).cuts_words
    assert not Cuts([], None, None).cuts_words
