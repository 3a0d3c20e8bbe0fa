"""xLLM's SLO-aware routing."""

import random

from gateway.core.types import Role
from gateway.policies.prediction.xllm_slo_aware import XllmSloAware
from tests.builders import a_load, a_pair_table, a_request, chosen


def pick(**tbt_s: float) -> tuple[str, str]:
    pairs = a_pair_table(
        [a_load("p1", Role.PREFILL), a_load("p2", Role.PREFILL)],
        [a_load(name, Role.DECODE) for name in tbt_s],
        wait_s={"p1": 0.6, "p2": 0.5},
        prefill_s={"p1": 0.1, "p2": 0.9},
        tbt_s=tbt_s,
    )
    return chosen(XllmSloAware().start(random.Random(0)), a_request(), pairs)


def test_prefill_goes_by_the_queue_alone_and_decode_to_the_first_within_50_ms() -> None:
    """p2 has the shorter queue, 0.5 s, though the longer prefill. d2 is the first of d2, d3 within the bound."""
    assert pick(d1=0.051, d2=0.050, d3=0.020) == ("p2", "d2")


def test_with_no_decode_engine_within_50_ms_the_fastest_is_taken() -> None:
    assert pick(d1=0.070, d2=0.060, d3=0.065) == ("p2", "d2")
