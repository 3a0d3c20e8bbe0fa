"""llm-d's prefix scores and its affinity filter."""

import numpy as np

from gateway.core.types import Role
from gateway.policies.llm_d_prefix import LlmDPrefix, LlmDPrefixSettings
from gateway.policies.stage import Stage
from tests.builders import a_dispatch, a_load, a_pair_table, a_request, hashes

PAIRS = a_pair_table([a_load("p1", Role.PREFILL), a_load("p2", Role.PREFILL)], [a_load("d1", Role.DECODE)])
STAGE = Stage(PAIRS.prefills, np.array([0, 1]), PAIRS)


def test_the_score_is_the_share_of_64_token_blocks_sent_there() -> None:
    """The first prompt has 8 blocks of 16 tokens, 2 of 64; the second shares the first 4 (64 tokens) of 12: 1 of 3."""
    prefix = LlmDPrefix(LlmDPrefixSettings())
    prefix.dispatched(a_request(block_hashes={16: hashes(*range(1, 9))}), a_dispatch(prefill="p2"), now=0.0)
    asked = a_request(block_hashes={16: hashes(1, 2, 3, 4, *range(20, 28))})
    assert list(prefix.scores(asked, STAGE, now=0.0)) == [0.0, 1 / 3]


def test_sticky_engines_keep_the_request_up_to_the_penalty() -> None:
    prefix = LlmDPrefix(LlmDPrefixSettings())
    scores = np.array([0.8, 0.79, 1.0])
    assert list(prefix.is_kept(scores, np.array([19.0, 1.0, 25.0]))) == [True, False, True]
    assert list(prefix.is_kept(scores, np.array([19.1, 1.0, 25.0]))) == [True, True, True]


def test_without_sticky_engines_all_are_kept() -> None:
    kept = LlmDPrefix(LlmDPrefixSettings()).is_kept(np.array([0.1, 0.2]), np.array([9.0, 1.0]))
    assert list(kept) == [True, True]
