"""Prompt text for a request that is known only by its size and its block ids. Pure and the same on every machine."""

from __future__ import annotations

import hashlib
from functools import lru_cache

from loadtest.workload import BLOCK_TOKENS, TraceRequest

_VOCABULARY = """
able also away back ball bank base bear best bird blue boat body book both call came card care case city club
cold come cool dark date deal deep door down draw each earn east easy edge ever face fact fair fall farm fast
feel film find fine fire fish five food foot form four free full game gave girl give goal gold good
"""
WORDS = tuple(_VOCABULARY.split())
"""64 words of four letters: with the space after it, each is one token of most English vocabularies."""


def synthesise(request: TraceRequest, *, characters_per_token: float, salt: str = "") -> str:
    """A prompt of `prompt_tokens` x `characters_per_token` characters that repeats exactly what its block ids say.

    Equal block ids give equal text and different ones differ from their first word on, so requests share the prefix
    that their ids share and no more. Without ids the text is the request's own; `salt` then tells apart requests
    that are equal in every field. How many tokens an engine counts depends on its vocabulary: about as many as asked
    with five characters per token on English ones.
    """
    block_characters = max(1, round(BLOCK_TOKENS * characters_per_token))
    total_characters = max(1, round(request.prompt_tokens * characters_per_token))
    if not request.block_ids:
        return _block(f"{salt} {request}", total_characters)
    *full, last = request.block_ids
    shared = "".join([_shared_block(block_id, block_characters) for block_id in full])
    return shared + _block(str(last), total_characters - len(shared))


@lru_cache(maxsize=4096)
def _shared_block(block_id: int, characters: int) -> str:
    """A whole block; kept, for blocks repeat. 4096 of them hold about 10 MB."""
    return _block(str(block_id), characters)


def _block(name: str, characters: int) -> str:
    """Words drawn from a digest of the name, after the name itself (or its digest), which is never cut off."""
    mark = name if len(name) <= 20 else hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
    digest = hashlib.shake_128(name.encode()).digest(characters // 5 + 1)
    text = f"{mark} " + " ".join([WORDS[byte & 63] for byte in digest])
    return text[: max(characters, len(mark) + 1)]
