"""Clients that come back: as they are told, or all the time; none is lost, and each is counted once."""

from __future__ import annotations

from itertools import islice

import pytest

from gateway.admissions.sluice import Sluice
from gateway.core.errors import ConfigError
from gateway.core.types import Slo
from gateway.policies.sluice import Sluice as SluicePolicy
from loadtest.bench_returns import CROWD, found, hammerer, with_crowd
from loadtest.generators import generate
from loadtest.sim_engines import Fleet
from loadtest.sim_plan import Plan, Run
from loadtest.sim_report import figures, outcome_of
from loadtest.sim_returns import HAMMER_S, Manner, Returning
from loadtest.simulator import simulate
from loadtest.workload import TraceRequest, scaled
from predictors.analytic import Analytic
from predictors.profile import load_profile

FLEET = Fleet(load_profile("llama3-8b-1xh100"), prefill=2, decode=2, block_tokens=16)


def a_plan(returning: Returning | None, *hammerers: TraceRequest) -> Plan:
    return Plan(
        fleet=FLEET,
        policy=SluicePolicy(),
        predictor=Analytic(FLEET.profile),
        admission=Sluice(),
        slo=Slo(ttft_s=0.5, tbt_s=0.05),
        returning=returning,
        hammerers=hammerers,
    )


def a_workload(count: int = 300, speed: float = 14.0) -> list[TraceRequest]:
    return list(scaled(islice(generate("azure-conversation", seed=3), count), speed=speed))


def returning(manner: Manner, **settings: int) -> Run:
    return simulate(a_plan(Returning(manner, **settings)), a_workload())


def test_who_is_told_a_time_comes_back_at_it_and_is_let_in() -> None:
    run = returning(Manner.OBEY)
    told = figures(run)["returns"]
    assert told["refused_clients"] > 20
    assert told["admitted_at_once_ratio"] >= 0.8
    assert figures(run)["requests"] == 300 == len({flight.visit.client for flight in run.flights})


def test_one_that_hammers_comes_back_after_a_tenth_of_a_second_until_it_gives_up() -> None:
    run = returning(Manner.HAMMER, max_visits=3)
    visits = {visit.request.id: visit for visit in run.visits}
    again = [visit for visit in run.visits if visit.visit.number > 1]
    assert again
    assert max(visit.visit.number for visit in run.visits) == 3
    for visit in again:
        number = visit.visit.number - 1
        before = visits[f"r{visit.visit.client}" if number == 1 else f"r{visit.visit.client}~{number}"]
        ended_at = before.request.arrived_at + (outcome_of(before).e2e_s or 0.0)
        assert visit.request.arrived_at == pytest.approx(ended_at + HAMMER_S)


def test_without_returns_nobody_comes_twice() -> None:
    run = simulate(a_plan(None), a_workload())
    assert not run.visits
    assert figures(run)["returns"]["returns"] == 0


def test_a_hammerer_is_counted_nowhere_and_takes_nearly_nothing_from_the_rest() -> None:
    workload = a_workload()
    alone = found(simulate(a_plan(Returning()), workload), 0.0)
    for kind in ("median", "longest"):
        run = simulate(a_plan(Returning(), hammerer(workload, kind)), workload)
        assert len(run.flights) == 300
        told = found(run, 0.0)
        assert told["rest_goodput_per_s"] >= 0.95 * alone["rest_goodput_per_s"]


def test_a_crowd_that_obeys_drains_and_no_second_one_comes_of_it() -> None:
    workload = with_crowd(a_workload(speed=5.0), 150, 2.0, seed=1)
    told = found(simulate(a_plan(Returning()), workload), 2.0)
    assert told["returns"] > 50
    assert told["admitted_ratio"] >= 0.8
    assert told["second_peak"] <= 0.05


def test_the_crowd_is_known_and_comes_at_its_instant() -> None:
    workload = with_crowd(a_workload(), 40, 1.5, seed=1)
    crowd = [request for request in workload if request.session == CROWD]
    assert len(crowd) == 40
    assert {request.arrival_s for request in crowd} == {1.5}
    assert [request for request in workload if request.session != CROWD] == a_workload()


def test_nobody_comes_less_than_once() -> None:
    with pytest.raises(ConfigError, match="at least once"):
        Returning(max_visits=0)
