"""The simulator against queueing theory, and what happens to requests when engines misbehave."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from gateway.admissions.sluice import Sluice as SluiceRule
from gateway.admissions.stage import Stage
from gateway.core.admission import AdmitAll
from gateway.core.errors import ConfigError
from gateway.core.types import Slo
from gateway.policies.least_work import LeastWork
from gateway.policies.prediction.mooncake_global import MooncakeGlobal
from gateway.policies.sluice import Sluice
from loadtest.fault_plan import Fault, FaultKind
from loadtest.report import Status
from loadtest.sim_engines import Fleet
from loadtest.sim_plan import Plan, Run
from loadtest.sim_report import figures, outcome_of
from loadtest.simulator import simulate
from loadtest.workload import TraceRequest
from predictors.analytic import Analytic
from predictors.profile import Profile

SECOND = Profile(
    name="a prefill takes a second, whatever its length; nothing else takes any time worth speaking of",
    prefill_base_s=1.0,
    prefill_floor_s=0.0,
    prefill_s_per_token=1e-12,
    prefill_s_per_square_token=0.0,
    decode_base_s=1e-6,
    decode_s_per_sequence=0.0,
    decode_s_per_kv_token=0.0,
    kv_bytes_per_token=1.0,
    kv_capacity_tokens=1_000_000,
    prefix_cache_tokens=1_000_000,
    link_base_s=0.0,
    link_bytes_per_s=1e12,
)


def a_run(workload: list[TraceRequest], profile: Profile = SECOND, **changes: Any) -> Run:
    fleet = {"prefill": 1, "decode": 1, "block_tokens": 16}
    fleet |= {name: changes.pop(name) for name in list(changes) if name in Fleet.__dataclass_fields__}
    plan = Plan(Fleet(profile, **fleet), LeastWork(), Analytic(profile), AdmitAll())
    return simulate(replace(plan, **changes), workload)


def poisson(rate_per_s: float, count: int, *, output_tokens: int = 1) -> list[TraceRequest]:
    gaps = np.random.default_rng(0).exponential(1 / rate_per_s, count)
    return [TraceRequest(float(at), 100, output_tokens) for at in np.cumsum(gaps)]


def at_once(count: int, prompt_tokens: int = 100, output_tokens: int = 1) -> list[TraceRequest]:
    return [TraceRequest(0.0, prompt_tokens, output_tokens) for _ in range(count)]


def ttfts(run: Run) -> list[float]:
    return [ttft for flight in run.flights if (ttft := outcome_of(flight).ttft_s) is not None]


# ---- theory ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("load", [0.3, 0.5])
def test_one_prefill_engine_makes_requests_wait_as_long_as_an_m_d_1_queue(load: float) -> None:
    run = a_run(poisson(load, 3000), report_interval_s=1e4, sample_interval_s=1e4)
    expected_s = load / (2 * (1 - load))  # Pollaczek and Khinchine, service time 1 s
    # Samples of this size scatter: Lindley's recursion over four seeds is off by 3 % to 17 %, over this one by 5 %.
    assert np.mean(ttfts(run)) - 1.0 == pytest.approx(expected_s, rel=0.1)


def test_every_single_wait_follows_lindleys_recursion() -> None:
    workload = poisson(0.8, 400)
    waits_s = [0.0]
    for before, request in pairwise(workload):
        waits_s.append(max(0.0, waits_s[-1] + 1.0 - (request.arrival_s - before.arrival_s)))
    assert [ttft - 1.0 for ttft in ttfts(a_run(workload))] == pytest.approx(waits_s, abs=1e-4)


def test_requests_in_flight_are_their_rate_times_their_time_as_little_says() -> None:
    run = a_run(poisson(0.8, 500), sample_interval_s=0.7, report_interval_s=1e4)
    rate_per_s = len(run.flights) / run.duration_s
    mean_s = float(np.mean([outcome_of(flight).e2e_s for flight in run.flights]))
    mean_in_flight = float(np.mean([sample.in_flight_count for sample in run.samples]))
    assert mean_in_flight == pytest.approx(rate_per_s * mean_s, rel=0.05)


def test_no_engine_idles_while_prompts_wait_and_none_works_twice() -> None:
    run = a_run(at_once(30), prefill=3)
    assert run.duration_s == pytest.approx(10.0, rel=1e-3)
    assert run.prefill_busy_ratio == pytest.approx(1.0, rel=1e-3)
    assert sorted(round(ttft) for ttft in ttfts(run)) == [second for second in range(1, 11) for _ in range(3)]


def test_busy_time_is_the_work_that_came() -> None:
    profile = replace(SECOND, prefill_s_per_token=1e-3)
    workload = [TraceRequest(0.1 * number, 50 + 10 * number, 1) for number in range(40)]
    run = a_run(workload, profile, prefill=2)
    work_s = sum(profile.prefill_s(request.prompt_tokens, 0) for request in workload)
    assert run.prefill_busy_ratio is not None
    assert run.prefill_busy_ratio * run.duration_s * 2 == pytest.approx(work_s, rel=1e-9)


def test_an_exact_predictor_predicts_exactly_where_nothing_is_left_to_chance() -> None:
    errors = figures(a_run(poisson(0.7, 200)))["prediction"]["ttft"]
    assert errors["p95_error_ratio"] < 0.001


# ---- the life of a request -------------------------------------------------------------------------------------------


def test_tokens_come_at_the_step_time_and_are_all_there() -> None:
    profile = replace(SECOND, decode_base_s=0.05)
    outcome = outcome_of(a_run(at_once(1, output_tokens=40), profile).flights[0])
    assert (outcome.status, outcome.output_tokens) == (Status.OK, 40)
    assert outcome.tbt_s == pytest.approx(0.05)


def test_an_engine_that_does_both_serves_without_a_hand_off() -> None:
    run = a_run(at_once(4, output_tokens=5), prefill=0, decode=0, both=2)
    assert [outcome_of(flight).output_tokens for flight in run.flights] == [5] * 4


def test_a_prefix_that_was_computed_is_not_computed_again() -> None:
    blocks = tuple(range(8))
    workload = [TraceRequest(at, 8 * 16, 2, blocks) for at in (0.0, 10.0)]
    first, second = a_run(workload).flights
    assert (first.cached_tokens, second.cached_tokens) == (0, 7 * 16)  # the last token is always computed


def test_a_prefix_elsewhere_is_pulled_when_the_policy_says_so() -> None:
    blocks = tuple(range(8))
    workload = [TraceRequest(0.0, 8 * 16, 2, blocks), TraceRequest(5.0, 64, 2), TraceRequest(5.1, 8 * 16, 2, blocks)]
    run = a_run(workload, prefill=2, policy=MooncakeGlobal())
    pulled = run.flights[2]
    assert pulled.dispatch is not None
    assert pulled.dispatch.estimate.fetch_from == "p1"
    assert (pulled.prefill.id if pulled.prefill else None, pulled.cached_tokens) == ("p2", 7 * 16)


def test_a_request_stopped_after_its_prefill_has_wasted_it() -> None:
    profile = replace(SECOND, decode_base_s=0.2)
    run = a_run(at_once(2), profile, admission=Stage(), slo=Slo(ttft_s=60.0, tbt_s=0.1))
    result = figures(run)
    assert (result["rejected"], result["rejected_after_prefill"]) == (2, 2)
    assert result["wasted_prefill_tokens"] == result["prefilled_tokens"] == 200


def test_what_no_engine_can_hold_is_refused() -> None:
    run = a_run(at_once(1, prompt_tokens=2_000_000))
    assert figures(run)["reasons"] == {"prompt_too_long": 1}


def test_a_run_without_requests_is_over_at_once() -> None:
    assert a_run([]).flights == []


# ---- trouble ---------------------------------------------------------------------------------------------------------


def with_fault(kind: FaultKind, engine_id: str, *, factor: float = 2.0, **changes: Any) -> Run:
    fault = Fault(kind, engine_id, at_s=2.5, duration_s=20.0, factor=factor)
    return a_run(poisson(1.2, 40, output_tokens=3), prefill=2, decode=2, faults=(fault,), **changes)


@pytest.mark.parametrize("engine_id", ["p1", "d1"])
def test_requests_of_an_engine_that_dies_are_served_by_another(engine_id: str) -> None:
    run = with_fault(FaultKind.DIES, engine_id)
    assert {outcome_of(flight).status for flight in run.flights} == {Status.OK}
    attempts = max(flight.request.attempt for flight in run.flights)
    # Whoever is still in its prefill when the decode engine dies is handed to the other one: nothing is done twice.
    assert attempts == (2 if engine_id == "p1" else 1)


def test_a_stream_is_lost_with_its_engine() -> None:
    profile = replace(SECOND, decode_base_s=1.0)
    fault = Fault(FaultKind.DIES, "d1", at_s=5.0, duration_s=1.0)
    (flight,) = a_run(at_once(1, output_tokens=30), profile, faults=(fault,)).flights
    assert (outcome_of(flight).status, outcome_of(flight).reason) == (Status.ERROR, "engine_lost")


def test_an_engine_that_was_dead_comes_back_empty_and_serves() -> None:
    blocks = tuple(range(8))
    workload = [TraceRequest(at, 8 * 16, 2, blocks) for at in (0.0, 30.0, 40.0)]
    run = a_run(workload, faults=(Fault(FaultKind.DIES, "p1", at_s=5.0, duration_s=10.0),))
    assert [flight.cached_tokens for flight in run.flights] == [0, 0, 7 * 16]


def test_an_engine_that_slows_down_takes_that_much_longer() -> None:
    fault = Fault(FaultKind.SLOWS, "p1", at_s=0.0, duration_s=100.0, factor=3.0)
    assert ttfts(a_run([TraceRequest(1.0, 100, 1)], faults=(fault,))) == pytest.approx([3.0], rel=1e-3)


def test_a_slow_port_makes_hand_offs_slow() -> None:
    profile = replace(SECOND, link_bytes_per_s=1000.0)
    fault = Fault(FaultKind.LINK_SLOWS, "d1", at_s=0.0, duration_s=100.0, factor=5.0)
    healthy, slow = (ttfts(a_run(at_once(1), profile, faults=faults))[0] for faults in ((), (fault,)))
    moved_s = 7 * 16 / 1000  # whole blocks move, a byte per token
    assert (healthy, slow) == pytest.approx((1.0 + moved_s, 1.0 + 5 * moved_s), abs=1e-3)


@pytest.mark.parametrize("kind", [FaultKind.LIES, FaultKind.SILENT])
def test_wrong_and_missing_reports_lose_no_request(kind: FaultKind) -> None:
    run = with_fault(kind, "p1", factor=5.0, report_delay_s=0.3)
    assert {outcome_of(flight).status for flight in run.flights} == {Status.OK}


def test_a_fault_names_an_engine_that_exists() -> None:
    with pytest.raises(ConfigError, match="there is no engine 'p9'"):
        with_fault(FaultKind.DIES, "p9")


def test_gateways_that_see_one_another_late_crowd_the_same_engines() -> None:
    workload = [TraceRequest(0.01 * number, 100, 1) for number in range(8)]

    def worst_s(view_delay_s: float) -> float:
        return max(ttfts(a_run(workload, prefill=8, gateways=2, view_delay_s=view_delay_s)))

    assert worst_s(0.001) == pytest.approx(1.0, rel=1e-3)
    assert worst_s(1e3) == pytest.approx(1.99, rel=1e-3)


# ---- prefills on decode engines ----------------------------------------------------------------------------------

BUSY = replace(SECOND, prefill_base_s=0.001, prefill_s_per_token=1e-4, decode_base_s=0.01, link_base_s=0.02)
"""A prompt of 20,000 tokens takes 2 s, one of 50 takes 6 ms."""


def test_short_prompts_do_not_wait_for_long_ones_and_nobodys_tokens_come_late() -> None:
    workload = [TraceRequest(2.0 * n, 20_000, 50) for n in range(20)]
    workload += [TraceRequest(0.3 + 0.9 * n, 50, 20) for n in range(40)]
    workload.sort(key=lambda request: request.arrival_s)
    slo = Slo(ttft_s=4.0, tbt_s=0.025)
    runs = [
        a_run(workload, BUSY, policy=Sluice(can_skip_hand_off=is_on), slo=slo, decode=2, admission=SluiceRule())
        for is_on in (False, True)
    ]
    off, on = (figures(run) for run in runs)
    assert off["local_prefill_ratio"] == 0.0
    assert on["local_prefill_ratio"] > 0.3
    assert on["attained_ratio"] >= off["attained_ratio"]
    assert on["ttft_of_shortest_s"]["p50"] < 0.1 * off["ttft_of_shortest_s"]["p50"]
    assert on["tbt_s"]["p99"] <= slo.tbt_s
