"""The clairvoyant's plans on workloads whose best is known by hand, and its search through the simulator."""

from __future__ import annotations

import json

import numpy as np
import pytest

from gateway.cli import main
from gateway.core.types import Slo
from loadtest.clairvoyant import Fill, keep_decodes, keep_prefills, kept_ids
from loadtest.fluid import demand_of
from loadtest.workload import TraceRequest
from tests.loadtest.test_fluid import ONE_AND_ONE, SECOND_PER_THOUSAND


def test_one_dear_request_goes_so_that_several_cheap_ones_stay() -> None:
    # 4 s, then five of 1 s: within 5 s fit the cheap ones, but not behind the dear one, which came first.
    requests = [TraceRequest(0.0, 4000, 1), *(TraceRequest(0.0, 1000, 1) for _ in range(5))]
    kept = keep_prefills(demand_of(requests, SECOND_PER_THOUSAND), 1, 5.0, 5.0)
    assert kept.tolist() == [False, True, True, True, True, True]


def test_who_would_miss_alone_is_never_kept() -> None:
    requests = [TraceRequest(0.0, 6000, 1), TraceRequest(100.0, 1000, 1)]
    assert keep_prefills(demand_of(requests, SECOND_PER_THOUSAND), 1, 5.0, 5.0).tolist() == [False, True]


def test_work_done_before_does_not_count_against_who_comes_later() -> None:
    requests = [TraceRequest(5.0 * number, 4000, 1) for number in range(10)]
    assert keep_prefills(demand_of(requests, SECOND_PER_THOUSAND), 1, 5.0, 5.0).all()


def test_the_longest_decode_goes_when_a_step_would_be_too_long() -> None:
    # Steps of 35 ms hold two sequences of 10 ms beside the base.
    requests = [TraceRequest(0.0, 1, 100), TraceRequest(0.0, 1, 300), TraceRequest(0.0, 1, 100)]
    kept = keep_decodes(demand_of(requests, SECOND_PER_THOUSAND), ONE_AND_ONE, 0.035, 1.0, np.ones(3, dtype=bool))
    assert kept.tolist() == [True, False, True]


def test_a_plan_names_requests_as_the_simulator_does() -> None:
    requests = [TraceRequest(0.0, 100, 2), TraceRequest(0.0, 9000, 2), TraceRequest(1.0, 100, 2)]
    plan = kept_ids(demand_of(requests, SECOND_PER_THOUSAND), ONE_AND_ONE, Slo(ttft_s=2.0, tbt_s=0.1), Fill())
    assert plan == {"r0", "r2"}


@pytest.mark.slow
def test_knowing_the_future_is_worth_more_than_a_rule(capsys: pytest.CaptureFixture[str]) -> None:
    pool = ["--workload", "conversation", "--seconds", "60", "--prefill", "2", "--decode", "1", "--speed", "4"]
    found = {}
    for rule in ("none", "ttft", "clairvoyant"):
        flags = ["--admission", rule, "--slo-ttft", "10", "--slo-tbt", "0.05", "--seed", "3", "--json"]
        assert main(["sim", *pool, *flags]) == 0
        result = json.loads(capsys.readouterr().out)
        found[rule] = result["attained_ratio"]
        assert result["attained_ratio"] <= result["fluid_bound_ratio"]
    assert found["clairvoyant"] > found["ttft"] > found["none"]
