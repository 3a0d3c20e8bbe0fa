"""No profile, nothing measured: what a gateway's decisions are worth after its first 200 requests."""

from __future__ import annotations

import pytest

from loadtest.sim_options import COLD, Spec, run_spec
from loadtest.sim_report import attained

LEARNT_FROM = 200
OVERLOAD = Spec(
    workload="conversation",
    seconds=150.0,
    speed=3.0,
    prefill=6,
    decode=6,
    profile="llama3-70b-8xa800-reference",
    policy="least_work",
    noise=0.1,
    slo_ttft=10.0,
    seed=1,
)


def later_ratio(predictor: str, admission: str) -> float:
    """The share in time of the requests after those that were learnt from."""
    run = run_spec(Spec(**{**vars(OVERLOAD), "predictor": predictor, "admission": admission}))
    later = attained(run, run.plan.slo)[LEARNT_FROM:]
    return sum(later) / len(later)


@pytest.mark.slow
def test_after_200_requests_a_cold_start_decides_nearly_as_well_as_one_that_knew_all() -> None:
    known, learnt = (later_ratio(predictor, "ttft") for predictor in ("analytic", COLD))
    assert later_ratio(COLD, "none") < 0.2
    assert learnt >= known - 0.03
