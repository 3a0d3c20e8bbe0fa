"""Gateways of a simulation share what they do by the messages of the live ones."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest

from gateway.admissions import sluice as admissions
from gateway.admissions.ttft import Ttft
from gateway.core.admission import AdmissionLimits
from gateway.core.types import Slo
from gateway.policies import sluice as policies
from gateway.policies.least_work import LeastWork
from loadtest.generators import generate
from loadtest.sim_engines import Fleet
from loadtest.sim_plan import Plan, Run
from loadtest.sim_report import figures
from loadtest.simulator import Simulation
from loadtest.workload import TraceRequest, scaled, unrounded
from predictors.analytic import Analytic
from predictors.profile import load_profile

FLEET = Fleet(load_profile("llama3-8b-1xh100"), prefill=3, decode=3, block_tokens=16)
PLAN = Plan(
    fleet=FLEET,
    policy=LeastWork(),
    predictor=Analytic(load_profile("llama3-8b-1xh100")),
    admission=Ttft(),
    slo=Slo(ttft_s=0.5, tbt_s=0.05),
    limits=AdmissionLimits(max_in_flight_per_engine=1000),
)


def a_run(gateways: int, view_delay_s: float | None = 0.005, *, count: int = 1500) -> tuple[Run, Simulation]:
    workload = list(scaled(islice(generate("azure-conversation", seed=1), count), speed=12.0))
    simulation = Simulation(replace(PLAN, gateways=gateways, view_delay_s=view_delay_s), workload)
    return simulation.run(), simulation


@pytest.mark.slow
def test_four_gateways_that_tell_each_other_do_nearly_as_well_as_one_and_four_that_do_not_do_worse():
    one, four, apart = (figures(a_run(*how)[0])["attained_ratio"] for how in ((1,), (4,), (4, None)))
    assert 0.3 < one < 0.99, "the workload is to overload them a little"
    assert four > 0.95 * one
    assert apart < four


@pytest.mark.slow
@pytest.mark.parametrize("is_bursty", [False, True])
def test_gateways_with_queues_of_their_own_take_turns_at_engines_that_become_free(is_bursty: bool) -> None:
    """Without turns all of them send to the same engine at the same instant, and half of what one serves is late."""
    requests = list(islice(generate("conversation", seed=2), 600))  # arrivals are rounded to 3 s
    profile = load_profile("llama3-70b-8xa800")
    plan = replace(
        PLAN,
        fleet=Fleet(profile, prefill=4, decode=4, block_tokens=512),
        predictor=Analytic(profile),
        slo=Slo(ttft_s=10.0, tbt_s=0.1),
        policy=policies.Sluice(),
        admission=admissions.Sluice(),
    )
    attained = {}
    for gateways in (1, 4):
        run = Simulation(
            replace(plan, gateways=gateways, view_delay_s=0.005), requests if is_bursty else list(unrounded(requests))
        ).run()
        attained[gateways] = figures(run)["attained_ratio"]
    assert 0.3 < attained[1] < 0.95, "the workload is to overload them"
    assert attained[4] > 0.93 * attained[1]


def test_in_the_end_no_gateway_holds_anything_for_anybody():
    _, simulation = a_run(3, count=200)
    until_at = simulation.agenda.next_at + 1.0
    while simulation.agenda.next_at < until_at:
        simulation.agenda.step()
    for gateway in simulation._gateways:
        gateway.scheduler.cluster.check()
        assert not gateway.scheduler.cluster.reservations


def test_arrivals_of_one_instant_are_spread_up_to_the_next():
    rounded = [TraceRequest(arrival_s=at, prompt_tokens=1, output_tokens=1) for at in (0, 0, 0, 3, 3, 6)]
    assert [request.arrival_s for request in unrounded(rounded)] == [0, 1, 2, 3, 4.5, 6]
    assert list(unrounded([])) == []
