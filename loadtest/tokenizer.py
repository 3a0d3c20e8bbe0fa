"""A tokenizer without a vocabulary file: reversible, the same in every process, about 3.5 characters a token.

Text is cut into pieces of an optional space plus up to three printable ASCII characters; anything else is a byte
each. A piece's id says its length and its characters: a single byte b is b; n ASCII characters are the base-128
number of them, offset by the ids of all shorter pieces. Ids stay below 2**29. A chat is `<|role|>content<|end|>` per
message, the marks being single tokens, so a longer chat starts with the tokens of the shorter one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

_PIECE = re.compile(rb" ?[!-~]{1,3}|[\x00-\xff]")
_OFFSETS = {2: 1 << 8, 3: (1 << 8) + (1 << 14), 4: (1 << 8) + (1 << 14) + (1 << 21)}
_END_OF_PIECES = _OFFSETS[4] + (1 << 28)
_ROLES = ("system", "user", "assistant", "tool", "developer", "other")
_MARKS = (*(f"<|{role}|>" for role in _ROLES), "<|end|>")
VOCABULARY_SIZE = _END_OF_PIECES + len(_MARKS)
"""Every id is below this."""


def encode(text: str) -> list[int]:
    """Token ids of a text; `decode` gives the text back."""
    return [_piece_id(piece) for piece in _PIECE.findall(text.encode("utf-8", "surrogatepass"))]


def decode(ids: Iterable[int]) -> str:
    """The text of token ids. Bytes that are not UTF-8 become U+FFFD."""
    return b"".join(map(_piece, ids)).decode("utf-8", "replace")


def encode_chat(messages: Sequence[Mapping[str, object]], *, is_open: bool = False) -> list[int]:
    """Token ids of a chat, with the mark that asks for the assistant's answer; `is_open`: the last message goes on."""
    ids: list[int] = []
    for message in messages:
        ids.append(_mark_id(str(message.get("role"))))
        ids += encode(_content_text(message.get("content")))
        ids.append(_END_OF_PIECES + len(_ROLES))
    if is_open:
        return ids[:-1]
    ids.append(_mark_id("assistant"))
    return ids


def _content_text(content: object) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))


def _mark_id(role: str) -> int:
    return _END_OF_PIECES + (_ROLES.index(role) if role in _ROLES else len(_ROLES) - 1)


def _piece_id(piece: bytes) -> int:
    if len(piece) == 1:
        return piece[0]
    number = 0
    for byte in piece:
        number = number << 7 | byte
    return _OFFSETS[len(piece)] + number


def _piece(token: int) -> bytes:
    if not 0 <= token < VOCABULARY_SIZE:
        return b""
    if token >= _END_OF_PIECES:
        return _MARKS[token - _END_OF_PIECES].encode()
    if token < 1 << 8:
        return bytes((token,))
    length = max(n for n, offset in _OFFSETS.items() if token >= offset)
    number = token - _OFFSETS[length]
    return bytes(number >> 7 * (length - 1 - i) & 0x7F for i in range(length))


WORDS: tuple[int, ...] = tuple(
    encode(f" {first}{vowel}{last}")[0] for first in "bdfgklmnprstvz" for vowel in "aeiou" for last in "lmnrs"
)
"""What an emulated model says: 350 words of one token each."""
