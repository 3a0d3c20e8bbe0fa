import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.core.blocks import Media, chain, hash_content, hash_prompt, root, spread_media

TOKENS = np.arange(1, 97)
token_lists = st.lists(st.integers(0, 2**63 - 1), max_size=80)


def test_only_full_blocks_are_hashed():
    assert hash_prompt(TOKENS[:95], 16).shape == (5,)
    assert hash_prompt(TOKENS[:15], 16).shape == (0,)
    assert hash_prompt(TOKENS[:0], 16).shape == (0,)


def test_hashes_are_the_same_on_every_machine():
    assert [int(h) for h in hash_prompt(TOKENS[:32], 16)] == [7689965240338828118, 7975532364369109240]
    assert int(hash_prompt(TOKENS[:16], 16, lora_name="sql", cache_salt="abc")[0]) == 7568832759042855397


def test_hashes_do_not_depend_on_the_hash_seed_of_the_process():
    code = (
        "import numpy; from gateway.core.blocks import hash_prompt; print(hash_prompt(numpy.arange(32), 16).tolist())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


@settings(deadline=None)
@given(token_lists, st.integers(1, 9), st.integers(0, 9))
def test_a_chain_continued_from_a_parent_equals_the_whole_chain(tokens, block_tokens, cut):
    whole = hash_prompt(np.array(tokens, np.int64), block_tokens)
    cut = min(cut, len(whole))
    parent = int(whole[cut - 1]) if cut else root(block_tokens)
    rest = chain(parent, np.array(tokens[cut * block_tokens :], np.int64), block_tokens)
    assert rest.tolist() == whole[cut:].tolist()


@settings(deadline=None)
@given(token_lists, token_lists)
def test_hashes_agree_exactly_as_far_as_the_prompts_do(a, b):
    x, y = (hash_prompt(np.array(tokens, np.int64), 2) for tokens in (a, b))
    for block in range(min(len(x), len(y))):
        same_prefix = a[: 2 * block + 2] == b[: 2 * block + 2]
        assert (x[block] == y[block]) == same_prefix


@pytest.mark.parametrize(
    "other",
    [
        {"lora_name": "sql"},
        {"lora_name": ""},
        {"cache_salt": "sql"},
        {"lora_name": "s", "cache_salt": "ql"},
        {"media": [Media("cat", 0, 4)]},
        {"media": [Media("cat", 1, 4)]},
        {"media": [Media("dog", 0, 4)]},
        {"media": [Media("cat", 0, 4), Media("dog", 8, 4)]},
    ],
)
def test_every_extra_key_separates_caches_from_the_first_block_on(other):
    plain = hash_prompt(TOKENS, 16)
    assert not np.isin(hash_prompt(TOKENS, 16, **other), plain).any()


def test_block_sizes_do_not_share_names():
    assert not np.isin(hash_prompt(np.zeros(64, int), 16), hash_prompt(np.zeros(64, int), 32)).any()


def test_media_separates_only_from_the_block_it_touches_on():
    plain, pictured = hash_prompt(TOKENS, 16), hash_prompt(TOKENS, 16, media=[Media("cat", 40, 4)])
    assert (plain == pictured).tolist() == [True, True, False, False, False, False]


def test_media_offsets_count_from_the_block_they_stand_in():
    spread = spread_media([Media("dog", 40, 2), Media("cat", 10, 30)], 16)
    assert spread == {0: [("cat", 10)], 1: [("cat", -6)], 2: [("cat", -22), ("dog", 8)]}


def test_one_changed_bit_of_a_token_changes_half_of_the_bits():
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 150_000, (4096, 16))
    flipped = tokens.copy()
    flipped[np.arange(4096), rng.integers(0, 16, 4096)] ^= 1 << rng.integers(0, 17, 4096)
    distances = np.bitwise_count(hash_content(tokens) ^ hash_content(flipped))
    assert 31.5 < np.mean(distances) < 32.5


def count_collisions(hashes):
    ordered = np.sort(hashes)
    return int((ordered[1:] == ordered[:-1]).sum())


def test_two_million_near_identical_blocks_collide_as_rarely_as_random_numbers():
    blocks = np.zeros((2_000_000, 4), np.int64)
    blocks[:, 1] = np.arange(2_000_000) % 2000
    blocks[:, 3] = np.arange(2_000_000) // 2000
    hashes = hash_content(blocks)
    assert count_collisions(hashes) == 0
    for half in (hashes >> np.uint64(32), hashes & np.uint64(0xFFFFFFFF)):
        assert 380 < count_collisions(half.astype(np.uint32)) < 552  # 466 expected (n^2 / 2^33), four deviations
