"""llm-d's sticky-until-saturated stack."""

import random

import numpy as np
import pytest

from gateway.core.interfaces import PairTable
from gateway.core.types import Role
from gateway.policies.prefix.llm_d_sticky import LlmDSticky, LlmDStickyChooser
from tests.builders import a_dispatch, a_load, a_pair_table, a_request, chosen, hashes

PROMPT = a_request(prompt_tokens=320, block_hashes={64: hashes(1, 2, 3, 4, 5)})


def table(*queued_tokens: int) -> PairTable:
    prefills = [a_load(f"p{row}", Role.PREFILL, queued_tokens=tokens) for row, tokens in enumerate(queued_tokens)]
    return a_pair_table(prefills, [a_load("d0", Role.DECODE)])


def knowing_p1(block_count: int) -> LlmDStickyChooser:
    chooser = LlmDSticky().start(random.Random(1))
    sent = a_request(block_hashes={64: hashes(1, 2, 3, 4, 5)[:block_count]})
    chooser.dispatched(sent, a_dispatch(prefill="p1", decode="d0"), now=0.0)
    return chooser


def test_the_score_falls_to_zero_at_saturation() -> None:
    """tau = 20,480 x 14 = 286,720 tokens."""
    scores = LlmDSticky().token_load_scores(np.array([0.0, 71_680.0, 286_720.0, 999_999.0]))
    assert list(scores) == pytest.approx([1.0, 0.75, 0.0, 0.0])


def test_a_prefix_of_four_fifths_sticks() -> None:
    """4 of 5 blocks: 0.8."""
    assert chosen(knowing_p1(4), PROMPT, table(0, 100_000)) == ("p1", "d0")
    assert chosen(knowing_p1(3), PROMPT, table(0, 100_000)) == ("p0", "d0")


def test_it_sticks_until_the_wait_is_18_s_longer() -> None:
    """18 s at 20,480 tokens per second are 368,640 tokens."""
    assert chosen(knowing_p1(5), PROMPT, table(0, 368_640)) == ("p1", "d0")
    assert chosen(knowing_p1(5), PROMPT, table(0, 368_641)) == ("p0", "d0")


def test_engines_beyond_saturation_are_equal() -> None:
    chooser = LlmDSticky().start(random.Random(1))
    picks = {chosen(chooser, a_request(), table(300_000, 400_000))[0] for _ in range(30)}
    assert picks == {"p0", "p1"}


def test_decode_goes_by_kv_tokens() -> None:
    decodes = [a_load("d0", Role.DECODE, kv_tokens=9), a_load("d1", Role.DECODE, kv_tokens=8)]
    pairs = a_pair_table([a_load("p0", Role.PREFILL)], decodes)
    assert chosen(LlmDSticky().start(random.Random(1)), a_request(), pairs) == ("p0", "d1")
