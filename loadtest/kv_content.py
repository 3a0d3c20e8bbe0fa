"""What KV says: block keys, block contents, and a language model whose words depend on every token it attends to.

A **key** names a full block for the prefix cache: (parent key, tokens, adapter, salt), so equal keys mean equal
prefixes. A **content** is what the block's memory holds: the state of a fold over all tokens up to its last one.
Memory can be wrong where a key is right (a hand-off that read recycled blocks); the text follows the memory, as it
does in a real engine. Contents fold token by token, so they do not depend on the block size.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

_MASK = (1 << 64) - 1
_ODD = 0x9E3779B97F4A7C15
"""2**64 / golden ratio, the multiplier of Fibonacci hashing (Knuth, TAOCP volume 3, 6.4)."""


def block_keys(
    tokens: Sequence[int], block_tokens: int, *, parent: int | None = None, lora: str = "", salt: str = ""
) -> Iterator[int]:
    """Yields the chained 64-bit key of each full block of `tokens`; with `parent`, `tokens` start after that block.

    The adapter enters every block; the salt only the first, and reaches the others through the chain.
    Source: vllm/v1/core/kv_cache_utils.py, generate_block_hash_extra_keys.
    """
    for start in range(0, len(tokens) - block_tokens + 1, block_tokens):
        extra = lora if parent is not None else f"{lora}\0{salt}"
        data = array("q", tokens[start : start + block_tokens]).tobytes()
        head = b"\0" * 8 if parent is None else parent.to_bytes(8, "big")
        parent = int.from_bytes(hashlib.blake2b(head + extra.encode() + b"\0" + data, digest_size=8).digest(), "big")
        yield parent


def root_state(lora: str) -> int:
    """The content before the first token: another adapter, another text."""
    return int.from_bytes(hashlib.blake2b(lora.encode(), digest_size=8).digest(), "big")


def fold(state: int, tokens: Iterable[int]) -> int:
    """The content after `tokens` follow `state`."""
    for token in tokens:
        state = ((state ^ (token + 1)) * _ODD) & _MASK
        state ^= state >> 29
    return state


@dataclass(slots=True)
class BlockContent:
    """One block of KV memory: the state it starts from, the state after its `filled` tokens."""

    entry: int = 0
    exit: int = 0
    filled: int = 0


def read_states(root: int, blocks: Iterable[BlockContent]) -> int:
    """The seed of the text that attention over these blocks gives; each break in the chain changes it."""
    state = root
    breaks = 0
    for block in blocks:
        if block.entry != state:
            breaks = fold(breaks, (state & 0xFFFFFFFF, block.entry & 0xFFFFFFFF))
        state = block.exit
    return state ^ breaks


def next_token(state: int, variant: int, vocabulary: Sequence[int]) -> int:
    """The output token that follows memory in `state`; `variant` 0 is the greedy text, others are samples."""
    return vocabulary[(fold(state, (variant,)) >> 16) % len(vocabulary)]


def is_last(state: int, variant: int, mean_tokens: int) -> bool:
    """Whether the text ends with the token that led to `state`: with a chance of one in `mean_tokens`.

    Like the next token it depends on nothing but what was said, so a text goes on the same wherever it was cut.
    """
    return (fold(state, (variant, 2)) >> 13) % mean_tokens == 0
