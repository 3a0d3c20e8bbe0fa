"""Refused requests let in one at a time: a rule that refuses too many is told apart from one that does not."""

from __future__ import annotations

from itertools import islice

import pytest

from gateway.admissions.ttft import Ttft
from gateway.core.types import Slo
from gateway.policies.least_work import LeastWork
from loadtest.counterfactual import Verdict, counterfactuals, lost
from loadtest.generators import generate
from loadtest.sim_engines import Fleet
from loadtest.sim_plan import Plan, Run
from loadtest.simulator import simulate
from loadtest.workload import TraceRequest, scaled
from predictors import predictor
from predictors.profile import load_profile

PROFILE = "llama3-70b-8xa800-reference"
FLEET = Fleet(load_profile(PROFILE), prefill=1, decode=1, block_tokens=16)


def a_plan(margin: float) -> Plan:
    return Plan(
        fleet=FLEET,
        policy=LeastWork(),
        predictor=predictor("analytic", profile=PROFILE),
        admission=Ttft(margin=margin),
        slo=Slo(ttft_s=1.0),
    )


def a_workload() -> list[TraceRequest]:
    return list(scaled(islice(generate("azure-conversation", seed=1), 150), speed=12.0))


def looked_back(margin: float, *, samples: int = 12, max_s: float = 60.0) -> tuple[Run, dict[str, float]]:
    plan = a_plan(margin)
    run = simulate(plan, a_workload())
    return run, counterfactuals(plan, a_workload, run, samples=samples, max_s=max_s)


def test_a_rule_that_refuses_what_would_have_met_is_found_out() -> None:
    _, strict = looked_back(margin=4.0)
    _, exact = looked_back(margin=1.0)
    assert strict["samples"] == exact["samples"] == 12
    assert strict["refused_but_would_have_met_ratio"] > 0.5
    assert exact["refused_but_would_have_met_ratio"] < 0.2
    assert (
        0 <= strict["refused_but_would_have_met_at_nobody_s_cost_ratio"] <= strict["refused_but_would_have_met_ratio"]
    )


def test_looking_back_changes_nothing_and_gives_the_same_twice() -> None:
    first_run, first = looked_back(margin=4.0, samples=5)
    second_run, second = looked_back(margin=4.0, samples=5)
    assert first == second
    assert [flight.outcome for flight in first_run.flights] == [flight.outcome for flight in second_run.flights]


def test_no_time_means_no_samples_and_no_ratio() -> None:
    _, told = looked_back(margin=4.0, max_s=0.0)
    assert (told["samples"], told["refused_but_would_have_met_ratio"]) == (0, None)
    assert told["refused"] > 0


def test_there_are_no_more_samples_than_refusals() -> None:
    _, told = looked_back(margin=1e-6)
    assert (told["refused"], told["samples"]) == (0, 0)


@pytest.mark.parametrize(("others", "count"), [({"a": True}, 0), ({"a": False}, 1), ({"a": False, "b": True}, 0)])
def test_what_it_cost_the_others_is_counted_over_those_that_had_ended(others: dict[str, bool], count: int) -> None:
    assert lost(Verdict("r", True, others), {"a": True, "b": False}) == count
