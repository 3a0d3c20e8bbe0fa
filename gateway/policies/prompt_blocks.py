"""A prompt's block hashes at the grain at which a router's own index works."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.core.types import Request


@dataclass(frozen=True, slots=True)
class PromptBlocks:
    """Chained hashes of a prompt's full blocks, first block first."""

    block_tokens: int
    hashes: list[int]


def prompt_blocks(request: Request, *, min_block_tokens: int = 1, max_tokens: int | None = None) -> PromptBlocks:
    """The prompt in the smallest blocks known, but not below `min_block_tokens`; of its first `max_tokens` tokens.

    Hashes are chained, so every second hash names blocks of twice the size. No hashes known: no blocks.
    """
    if not request.block_hashes:
        return PromptBlocks(min_block_tokens, [])
    known_tokens = min(request.block_hashes)
    stride = -(-min_block_tokens // known_tokens)
    block_tokens = known_tokens * stride
    hashes = request.block_hashes[known_tokens][stride - 1 :: stride]
    limit = len(hashes) if max_tokens is None else max_tokens // block_tokens
    return PromptBlocks(block_tokens, hashes[:limit].tolist())
