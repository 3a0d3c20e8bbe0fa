"""Token ids -> chained 64-bit hashes of KV blocks: the name under which the whole gateway knows a block.

Engines name their KV blocks with hashes of their own (SHA-256 of pickles, of CBOR, of raw pages; low or high eight
bytes; signed or not). We keep one name of ours, computed from what all of them agree on, the token ids, so that the
request side (a prompt that arrives) and the event side (an engine that says "stored these tokens after that block")
meet in the same 64 bits whatever the engine.

The hash of block i stands for the whole prefix up to and including block i:

    content_i = mix(sum over tokens t_j of scramble(t_j) * K_j  +  media of the block)        K_j: odd, one per position
    state_i   = state_(i-1) * A + content_i                                                   all modulo 2^64
    hash_i    = mix(state_i),  hash_(-1) = root(block size, LoRA name, cache salt)

`mix` is a bijection, so a parent's hash gives back the state to go on from: the event side continues a chain of which
it knows only the parent. The recurrence is linear, so it needs no loop: with powers of A and of its inverse,
state_i = A^i * (state_(-1) * A + cumulative sum of content_j * A^-j), which is a handful of numpy passes for any prompt
(a cryptographic hash per block costs about 1 us each, 8 ms for 8,192 blocks, on the event loop).

Nothing here is secret or keyed: whoever crafts two prompts with one hash misleads the estimate of his own request. The
engine still compares its own hashes, so no KV ever crosses over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from gateway.core.types import BlockHashes

MediaKey: TypeAlias = tuple[str, int]
"""Media id, and where the item starts relative to the block's first token (negative: in an earlier block).

Source: vLLM's extra key `(identifier, offset - start_token_idx)`, vllm/v1/core/kv_cache_utils.py.
"""

BlockMedia: TypeAlias = Mapping[int, Sequence[MediaKey]]
"""Index of a block in its call -> the media items that touch it, in prompt order."""

# Odd multipliers without structure: MurmurHash3's fmix64 pair, and 64 bits of the golden ratio and of sqrt(3).
_MIX_1 = 0xFF51AFD7ED558CCD
_MIX_2 = 0xC4CEB9FE1A85EC53
_SCRAMBLE = 0x9E3779B97F4A7C15
_CHAIN = 0xBB67AE8584CAA73B
_WORD = 1 << 64
_UNMIX_1 = pow(_MIX_1, -1, _WORD)
_UNMIX_2 = pow(_MIX_2, -1, _WORD)
_UNCHAIN = pow(_CHAIN, -1, _WORD)

_SLICE_TOKENS = 16_384
"""Tokens scrambled at a time: 128 KiB of words stay in the L2 cache, and the allocator hands the same pages out again.
Measured on 131,072 tokens in blocks of 16: 0.20 ms in slices, 0.91 ms in one piece (page faults)."""

_SHORT_BLOCKS = 32
"""Up to here the recurrence itself is faster than its closed form (one block: 1 us and 9 us)."""


@dataclass(frozen=True, slots=True)
class Media:
    """A media item of a prompt: its content id and the placeholder tokens it stands for."""

    id: str
    start_token: int
    token_count: int


def hash_prompt(
    token_ids: NDArray[np.integer],
    block_tokens: int,
    *,
    lora_name: str | None = None,
    cache_salt: str | None = None,
    media: Sequence[Media] = (),
) -> BlockHashes:
    """The hashes of the prompt's full blocks, shape (len(token_ids) // block_tokens,). Token ids are >= 0."""
    start = root(block_tokens, lora_name=lora_name, cache_salt=cache_salt)
    return chain(start, token_ids, block_tokens, spread_media(media, block_tokens))


@lru_cache(maxsize=1024)  # the same few for nearly every prompt; a salt of a client's own only costs what it did
def root(block_tokens: int, *, lora_name: str | None = None, cache_salt: str | None = None) -> int:
    """The hash before the first block, 0 <= root < 2^64. What separates caches, the block size included, is in it."""
    return _digest("root", str(block_tokens), _optional(lora_name), _optional(cache_salt))


def chain(
    parent_hash: int, token_ids: NDArray[np.integer], block_tokens: int, media: BlockMedia | None = None
) -> BlockHashes:
    """The hashes of the full blocks that follow the block `parent_hash`, shape (len(token_ids) // block_tokens,)."""
    block_count = len(token_ids) // block_tokens
    content = hash_content(token_ids[: block_count * block_tokens].reshape(block_count, block_tokens), media)
    return _mix(_advance_far(_unmix(int(parent_hash)), content))


def advance(state: int, content: NDArray[np.uint64]) -> list[int]:
    """The states after each of the blocks with these content hashes; `hash_of` makes their hashes of them."""
    if len(content) > _SHORT_BLOCKS:
        far: list[int] = _advance_far(state, content).tolist()
        return far
    states = []
    for word in content.tolist():
        state = (state * _CHAIN + word) % _WORD
        states.append(state)
    return states


def hash_of(states: NDArray[np.uint64]) -> BlockHashes:
    """The block hashes of these states of a chain, shape of `states`."""
    return _mix(states)


def state_of(block_hash: int) -> int:
    """The state of a chain at the block with this hash."""
    return _unmix(block_hash)


def hash_content(blocks: NDArray[np.integer], media: BlockMedia | None = None) -> NDArray[np.uint64]:
    """Hash of each block by itself, shape (blocks,), of `blocks` with shape (blocks, tokens per block)."""
    block_count, block_tokens = blocks.shape
    position_keys = _position_keys(block_tokens)
    content = np.empty(block_count, np.uint64)
    step = max(1, _SLICE_TOKENS // block_tokens)
    for first in range(0, block_count, step):
        content[first : first + step] = _scramble(blocks[first : first + step]) @ position_keys
    for block, keys in (media or {}).items():
        if 0 <= block < len(content):
            parts = [part for media_id, offset in keys for part in (media_id, str(offset))]
            content[block] ^= np.uint64(_digest("media", *parts))
    return _mix(content)


def spread_media(media: Sequence[Media], block_tokens: int) -> dict[int, list[MediaKey]]:
    """Which media items touch which block: block index -> [(media id, item start - block start)], in prompt order."""
    touched: dict[int, list[MediaKey]] = {}
    for item in sorted(media, key=lambda item: item.start_token):
        last_token = item.start_token + item.token_count - 1
        for block in range(item.start_token // block_tokens, last_token // block_tokens + 1):
            touched.setdefault(block, []).append((item.id, item.start_token - block * block_tokens))
    return touched


def _advance_far(state: int, content: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`advance` in closed form, shape of `content`: (blocks,)."""
    total = np.cumsum(content * _powers(_UNCHAIN, len(content)))
    total += np.uint64(state * _CHAIN % _WORD)
    states: NDArray[np.uint64] = total * _powers(_CHAIN, len(content))
    return states


def _scramble(blocks: NDArray[np.integer]) -> NDArray[np.uint64]:
    """Token ids spread over 64 bits, shape of `blocks`. Not linear in the id, lest two changed tokens cancel out."""
    words = blocks.astype(np.uint64)
    words += np.uint64(1)
    words *= np.uint64(_SCRAMBLE)
    words ^= words >> np.uint64(32)
    return words


@lru_cache(maxsize=16)  # a handful of block sizes in use: 15 us less per prompt
def _position_keys(block_tokens: int) -> NDArray[np.uint64]:
    """One odd multiplier per position in a block, shape (block_tokens,), not to be written to."""
    positions = np.arange(1, block_tokens + 1, dtype=np.uint64)
    return _unwritable(_mix(positions * np.uint64(_CHAIN)) | np.uint64(1))


def _powers(base: int, count: int) -> NDArray[np.uint64]:
    """base^0 .. base^(count-1) modulo 2^64, shape (count,), not to be written to."""
    return _power_table(base, 1 << count.bit_length())[:count]


@lru_cache(maxsize=64)  # two bases, and sizes that double: together twice the longest, 16 bytes per block of it
def _power_table(base: int, count: int) -> NDArray[np.uint64]:
    factors = np.full(count, base, np.uint64)
    factors[:1] = 1
    return _unwritable(np.cumprod(factors))


def _unwritable(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The same array; one that is shared must not change."""
    words.setflags(write=False)
    return words


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection of 64 bits after which every output bit depends on every input bit (fmix64 of MurmurHash3)."""
    words = words ^ (words >> np.uint64(33))
    words *= np.uint64(_MIX_1)
    words ^= words >> np.uint64(33)
    words *= np.uint64(_MIX_2)
    words ^= words >> np.uint64(33)
    return words


def _unmix(word: int) -> int:
    """The inverse of `_mix` for one value. A shift by 33 of 64 bits undoes itself."""
    word ^= word >> 33
    word = word * _UNMIX_2 % _WORD
    word ^= word >> 33
    word = word * _UNMIX_1 % _WORD
    return word ^ (word >> 33)


def _optional(text: str | None) -> str:
    """Text that tells None from every string."""
    return "-" if text is None else "+" + text


def _digest(*parts: str) -> int:
    """64 bits of the parts; each is preceded by its length, so that no two lists of parts read alike."""
    digest = blake2b(digest_size=8)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest(), "little")
