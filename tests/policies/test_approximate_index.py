"""What a router believes to be cached from what it sent."""

from hypothesis import given
from hypothesis import strategies as st

from gateway.policies.approximate_index import ApproximateIndex
from gateway.policies.stage import MAX_ENGINES

prompts = st.lists(st.integers(0, 5), max_size=6).map(
    lambda turns: [hash(tuple(turns[: i + 1])) for i in range(len(turns))]
)
"""Prompts as chained hashes: equal hashes mean equal prefixes."""


@given(st.lists(st.tuples(st.sampled_from("abc"), prompts), max_size=20), prompts)
def test_without_limits_it_is_the_longest_common_prefix(sent: list[tuple[str, list[int]]], asked: list[int]) -> None:
    index = ApproximateIndex()
    for engine_id, prompt in sent:
        index.insert(engine_id, prompt, max_blocks=1000, now=0.0)
    expected = []
    for engine_id in "abcd":
        held = {block for other, prompt in sent for block in prompt if other == engine_id}
        expected.append(next((depth for depth, block in enumerate(asked) if block not in held), len(asked)))
    assert list(index.matched_blocks(asked, list("abcd"), now=0.0)) == expected


def test_the_least_recently_sent_block_goes_first_and_prefixes_shrink_from_their_end() -> None:
    index = ApproximateIndex()
    index.insert("a", [1, 2, 3], max_blocks=4, now=0.0)
    index.insert("a", [7, 8], max_blocks=4, now=1.0)
    assert list(index.matched_blocks([1, 2, 3], ["a"], now=1.0)) == [2]
    assert index.block_count("a") == len(index) == 4


def test_blocks_not_sent_again_in_time_are_forgotten() -> None:
    index = ApproximateIndex(keep_s=10.0)
    index.insert("a", [1, 2], max_blocks=9, now=0.0)
    index.insert("a", [1], max_blocks=9, now=8.0)
    assert list(index.matched_blocks([1, 2], ["a"], now=10.0)) == [2]
    assert list(index.matched_blocks([1, 2], ["a"], now=10.5)) == [1]


def test_of_too_many_engines_the_one_not_sent_to_for_longest_is_forgotten() -> None:
    index = ApproximateIndex()
    for number in range(MAX_ENGINES + 1):
        index.insert(f"e{number}", [1, number + 2], max_blocks=9, now=0.0)
        index.insert("e0", [1], max_blocks=9, now=0.0)
    matched = index.matched_blocks([1], ["e0", "e1", "e2"], now=0.0)
    assert list(matched) == [1, 0, 1]


def test_a_prompt_longer_than_the_limit_keeps_its_start() -> None:
    index = ApproximateIndex()
    index.insert("a", [1, 2, 3, 4], max_blocks=2, now=0.0)
    assert list(index.matched_blocks([1, 2, 3], ["a"], now=0.0)) == [2]
