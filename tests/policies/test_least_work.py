"""Least predicted work: the pair that is predicted to be done first."""

import random

import numpy as np
import pytest

from gateway.core.interfaces import EngineLoad, PairTable
from gateway.core.types import Role
from gateway.policies.least_work import LeastWork
from tests.builders import a_request, an_engine


def an_idle(name: str, role: Role) -> EngineLoad:
    return EngineLoad(an_engine(name, role), None, None, 0, 0, 0, 0.0, 0, 0)


def a_table(ttft_s: list[float], tbt_s: list[float]) -> PairTable:
    rows = len(ttft_s)
    zeros = np.zeros(rows)
    return PairTable(
        prefills=tuple(an_idle(f"p{row}", Role.PREFILL) for row in range(rows)),
        decodes=(an_idle("d", Role.DECODE),),
        prefill_row=np.arange(rows),
        decode_row=np.zeros(rows, dtype=np.intp),
        cached_tokens=np.zeros(rows, dtype=np.int64),
        wait_s=zeros,
        fetch_s=zeros,
        prefill_s=np.array(ttft_s),
        hand_off_s=zeros,
        join_s=zeros,
        tbt_s=np.array(tbt_s),
    )


def test_a_short_answer_is_worth_less_decode_speed() -> None:
    policy = LeastWork(output_tokens=100).start(random.Random(0))
    pairs = a_table(ttft_s=[1.0, 2.0], tbt_s=[0.05, 0.02])
    long_costs = policy.costs(a_request(), pairs, now=0.0)
    short_costs = policy.costs(a_request(max_output_tokens=10), pairs, now=0.0)
    assert list(long_costs) == pytest.approx([6.0, 4.0])
    assert list(short_costs) == pytest.approx([1.5, 2.2])
