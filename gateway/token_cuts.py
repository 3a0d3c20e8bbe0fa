"""Where a text may be cut so that the parts, encoded one by one, give exactly the tokens of the whole.

Two kinds of cut, each used only where it can be proved from the tokenizer's own description:

* *Before a marker*, an added token such as `<|im_start|>`. The tokenizer splits the raw text at added tokens before
  it normalises anything, so what stands left and right of one never meets. Cutting before rather than after it keeps
  every later text away from offset 0, which Metaspace treats differently ("first").
* *Before the space between two ASCII letters*, when the pre-tokenizer always has a boundary there, whatever stands
  around it, and the normalizer cannot look across it.

A tokenizer whose pre-tokenizer keeps a whole text as one word (Metaspace without split, none at all), whose
normalizer strips, prepends or replaces, or whose regex is not in the table below, is cut at markers only.

Source: tokenizers 0.23, `AddedVocabulary::extract_and_normalize`, `pre_tokenizers/*.rs`, `normalizers/*.rs`.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

TARGET_CHARS = 1024
"""Least length of a part. Of a conversation that goes on, the last part is encoded anew with each turn (0.27 us per
character), and each part before it is looked up (2 us). Turns of 1 KB on 200 KB: 2.65 ms per request, 2.9 with parts of
2,048, 3.55 with 4,096."""

LONGEST_CHARS = 16384
"""Length from which a part is cut between words: about 4 ms of encoding, 0.2 ms of holding the interpreter."""

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_O200K_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
)
DIVIDING_PATTERNS = frozenset(
    {
        # GPT-2
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        # cl100k, Llama 3
        _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _TAIL,
        # Qwen 2 to 3
        _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _TAIL,
        # Qwen 3.5
        _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _TAIL,
        # o200k
        "|".join(_O200K_WORDS) + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _TAIL,
        # DeepSeek V3, third of its splits
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        r"| ?[\p{P}\p{S}]+[\r\n]*" + _TAIL,
    }
)
"""Regexes of which no match holds a letter and then a space, so that one always starts at a space after a letter.
None looks behind, and what looks ahead looks only past white space: the left part matches as it does in the whole."""

NEUTRAL_PATTERNS = frozenset({r"\p{N}{1,3}", r"\p{N}", r"[一-龥぀-ゟ゠-ヿ]+"})  # noqa: RUF001 (DeepSeek's own)
"""Regexes whose matches hold neither letters of ASCII nor spaces: they neither make nor cross such a boundary."""

_LOCAL_NORMALIZERS = frozenset({"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "BertNormalizer"})
"""Normalizers that cannot look across the space between two ASCII letters: a space composes with nothing before it."""

_WORD_GAP = re.compile(r"(?<=[A-Za-z]) (?=[A-Za-z])")


@dataclass(frozen=True, slots=True)
class AddedTokenFacts:
    """What matters of an added token; the flags are those of tokenizer.json."""

    content: str
    is_normalized: bool = False
    strips_left: bool = False
    strips_right: bool = False
    is_single_word: bool = False


class Cuts:
    """Cuts texts for one tokenizer. Pure: the same text is always cut at the same places, and a text that begins
    with another is cut at the same places as far as that one's last part but one."""

    def __init__(self, added: Sequence[AddedTokenFacts], normalizer: object, pre_tokenizer: object) -> None:
        markers = sorted(token.content for token in added if _is_marker(token, added))
        self._marker = re.compile("|".join(map(re.escape, markers))) if markers else None
        self.has_markers = bool(markers)
        self.cuts_words = (
            _divides_words(pre_tokenizer)
            and all(_type(step) in _LOCAL_NORMALIZERS for step in _steps(normalizer, "normalizers"))
            and all(_spares_word_gaps(token) for token in added)
        )

    def parts(self, text: str) -> Iterator[str]:
        """The text in order, in parts that can be encoded one by one; each but the last has TARGET_CHARS or more."""
        start = 0
        for end in self._ends(text):
            yield text[start:end]
            start = end
        if start < len(text):
            yield text[start:]

    def _ends(self, text: str) -> Iterator[int]:
        start = 0
        for marker in self._marker_starts(text):
            if marker - start < TARGET_CHARS:
                continue
            yield from self._word_ends(text, start, marker)
            yield marker
            start = marker
        yield from self._word_ends(text, start, len(text))

    def _marker_starts(self, text: str) -> Iterator[int]:
        if self._marker is not None:
            for match in self._marker.finditer(text):
                yield match.start()

    def _word_ends(self, text: str, start: int, end: int) -> Iterator[int]:
        while self.cuts_words and end - start > LONGEST_CHARS:
            gap = _WORD_GAP.search(text, start + LONGEST_CHARS // 2, end)
            if gap is None:
                return
            start = gap.start()
            yield start


def _is_marker(token: AddedTokenFacts, added: Iterable[AddedTokenFacts]) -> bool:
    """Whether the tokenizer splits the text before this token wherever its content stands."""
    content = token.content
    if token.is_normalized or not content or content[0] not in string.punctuation:
        return False
    for other in added:
        is_alike = other.content.startswith(content) or content.startswith(other.content)
        if is_alike and (other.strips_left or other.is_single_word):
            return False
        if _straddles(other.content, content):
            return False
    return True


def _straddles(content: str, marker: str) -> bool:
    """Whether an occurrence of `content` can begin before a marker and reach into it."""
    rests = (content[at:] for at in range(1, len(content)) if content[at] == marker[0])
    return any(rest.startswith(marker) or marker.startswith(rest) for rest in rests)


def _spares_word_gaps(token: AddedTokenFacts) -> bool:
    """Whether the token can neither hold, nor swallow, nor turn into, the space between two ASCII letters."""
    content = token.content
    if any(char.isspace() for char in content) or (token.is_normalized and not content.isascii()):
        return False
    swallows_left = token.strips_left and content[:1] in string.ascii_letters
    swallows_right = token.strips_right and content[-1:] in string.ascii_letters
    return not (swallows_left or swallows_right)


def _divides_words(pre_tokenizer: object) -> bool:
    """Whether every ASCII-letter, space, ASCII-letter has a boundary before the space that nothing reaches across."""
    divides = False
    steps = list(_steps(pre_tokenizer, "pretokenizers"))
    for position, step in enumerate(steps):
        is_last = position == len(steps) - 1
        if _is_dividing(step, is_last=is_last):
            divides = True
        elif not _is_neutral(step, is_last=is_last):
            return False
    return divides


def _is_dividing(step: Mapping[str, object], *, is_last: bool) -> bool:
    kind = _type(step)
    if kind == "Split":
        return _pattern(step) in DIVIDING_PATTERNS and _keeps_matches(step)
    if kind == "ByteLevel":  # writes spaces as another character: nothing after it can be judged
        return is_last and step.get("use_regex", True) is True
    if kind == "Metaspace":
        return is_last and step.get("split", True) is True
    return kind in ("Whitespace", "WhitespaceSplit", "BertPreTokenizer") and is_last


def _is_neutral(step: Mapping[str, object], *, is_last: bool) -> bool:
    kind = _type(step)
    if kind == "Split":
        return _pattern(step) in NEUTRAL_PATTERNS and _keeps_matches(step)
    return kind == "Digits" or (kind == "ByteLevel" and is_last)


def _keeps_matches(step: Mapping[str, object]) -> bool:
    behavior = (step.get("behavior"), step.get("invert", False))
    return behavior in (("Isolated", False), ("Removed", True))


def _pattern(step: Mapping[str, object]) -> object:
    pattern = step.get("pattern")
    return pattern.get("Regex") if isinstance(pattern, Mapping) else None


def _steps(component: object, key: str) -> Iterator[Mapping[str, object]]:
    """The component's steps, sequences unfolded; an absent component has none."""
    if component is None:
        return
    if not isinstance(component, Mapping):
        yield {}
    elif component.get("type") == "Sequence" and isinstance(steps := component.get(key), Sequence):
        for step in steps:
            yield from _steps(step, key)
    else:
        yield component


def _type(step: Mapping[str, object]) -> object:
    return step.get("type")
