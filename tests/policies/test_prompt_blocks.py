"""A prompt's block hashes at the grain of a router's index."""

from gateway.policies.prompt_blocks import prompt_blocks
from tests.builders import a_request, hashes

REQUEST = a_request(prompt_tokens=112, block_hashes={16: hashes(1, 2, 3, 4, 5, 6, 7), 64: hashes(4)})


def test_the_smallest_blocks_known_are_used() -> None:
    blocks = prompt_blocks(REQUEST)
    assert (blocks.block_tokens, blocks.hashes) == (16, [1, 2, 3, 4, 5, 6, 7])


def test_every_nth_hash_names_blocks_n_times_as_large() -> None:
    """At least 40 tokens: blocks of 48, whose hashes are those of every third block; the rest is none."""
    blocks = prompt_blocks(REQUEST, min_block_tokens=40)
    assert (blocks.block_tokens, blocks.hashes) == (48, [3, 6])


def test_only_the_start_of_a_long_prompt_counts() -> None:
    assert prompt_blocks(REQUEST, max_tokens=40).hashes == [1, 2]


def test_a_prompt_without_hashes_has_no_blocks() -> None:
    assert prompt_blocks(a_request(), min_block_tokens=16).hashes == []
