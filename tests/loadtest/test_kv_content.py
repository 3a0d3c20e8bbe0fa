"""Keys name prefixes, contents are what memory holds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from loadtest.kv_content import BlockContent, block_keys, fold, is_last, next_token, read_states, root_state

TOKENS = list(range(100, 164))


def blocks(tokens: list[int], size: int, lora: str = "") -> list[BlockContent]:
    state, found = root_state(lora), []
    for start in range(0, len(tokens), size):
        part = tokens[start : start + size]
        found.append(BlockContent(state, fold(state, part), len(part)))
        state = found[-1].exit
    return found


def test_only_full_blocks_have_keys() -> None:
    assert len(list(block_keys(TOKENS[:63], 16))) == 3
    assert list(block_keys(TOKENS[:15], 16)) == []


def test_keys_of_a_continuation_follow_from_the_parent() -> None:
    whole = list(block_keys(TOKENS, 16, lora="l", salt="s"))
    assert list(block_keys(TOKENS[32:], 16, parent=whole[1], lora="l", salt="s")) == whole[2:]


def test_an_early_token_a_salt_or_an_adapter_changes_every_later_key() -> None:
    plain = set(block_keys(TOKENS, 16))
    for other in (
        block_keys([0, *TOKENS[1:]], 16),
        block_keys(TOKENS, 16, salt="s"),
        block_keys(TOKENS, 16, lora="l"),
    ):
        assert plain.isdisjoint(other)


@given(st.lists(st.integers(0, 2**29), min_size=1, max_size=80), st.integers(1, 20), st.integers(1, 20))
def test_the_text_does_not_depend_on_the_block_size(tokens: list[int], one: int, other: int) -> None:
    assert read_states(root_state(""), blocks(tokens, one)) == read_states(root_state(""), blocks(tokens, other))


@given(st.permutations(range(8)))
def test_the_text_depends_on_the_order_of_the_blocks(order: list[int]) -> None:
    right = blocks(TOKENS, 8)
    seed = read_states(root_state(""), [right[i] for i in order])
    assert (seed == read_states(root_state(""), right)) == (order == sorted(order))


def test_a_text_ends_at_about_the_mean_length() -> None:
    ends = [is_last(fold(1, (number,)), 0, 100) for number in range(20_000)]
    assert 150 < sum(ends) < 250


def test_output_tokens_come_from_the_vocabulary() -> None:
    assert {next_token(fold(5, (i,)), 0, (7, 8, 9)) for i in range(50)} == {7, 8, 9}
