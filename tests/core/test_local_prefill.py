"""A decode engine that computes a prompt itself: where it can, where it is better, and without harm to others."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gateway.admissions.sluice import Sluice as SluiceRule
from gateway.core.admission import AdmissionLimits, AdmitAll
from gateway.core.events import BlocksStored, EngineFound, EngineHealth, FeedState, Finished, FirstToken, KvFeed
from gateway.core.interfaces import Admission, Policy
from gateway.core.learning import slow_stall_s
from gateway.core.scheduler import Scheduler
from gateway.core.types import Dispatch, Engine, Estimate, Health, Role, Slo
from gateway.policies import POLICIES
from gateway.policies.least_work import LeastWork
from gateway.policies.sluice import Sluice
from predictors.analytic import Analytic
from predictors.profile import WEAK_PRIOR
from tests.builders import a_mesh, a_request, an_engine, hashes

TIMES = replace(
    WEAK_PRIOR,
    prefill_base_s=0.0,
    prefill_floor_s=0.0,
    prefill_s_per_token=1e-4,
    prefill_s_per_square_token=0.0,
    decode_base_s=0.02,
    decode_s_per_sequence=0.0,
    decode_s_per_kv_token=0.0,
    link_base_s=0.05,
    link_bytes_per_s=1e18,
)
"""A prompt token takes 0.1 ms, a step 20 ms, a transfer 50 ms: below 700 tokens an idle decode engine is quicker."""
BOUND = Slo(ttft_s=60.0, tbt_s=0.1)
ALONE = ("d1", "d1")


def a_scheduler(*engines: Engine, policy: Policy | None = None, admission: Admission | None = None) -> Scheduler:
    scheduler = Scheduler(
        policy=policy or Sluice(),
        predictor=Analytic(TIMES),
        admission=admission or SluiceRule(engine_queue_s=0.0),
        limits=AdmissionLimits(),
        rng=random.Random(0),
        max_blocks=4096,
    )
    for engine in engines or a_mesh(1, 1):
        scheduler.apply(EngineFound(engine), now=0.0)
        scheduler.apply(EngineHealth(engine.id, Health.UP), now=0.0)
    return scheduler


def sent(scheduler: Scheduler, request_id: str = "r1", *, now: float = 0.0, **fields: Any) -> Estimate:
    decision = scheduler.decide(a_request(request_id, arrived_at=now, **{"slo": BOUND, **fields}), now=now)
    assert isinstance(decision, Dispatch)
    return decision.estimate


def pair_of(estimate: Estimate) -> tuple[str, str]:
    return estimate.prefill, estimate.decode


def decoding(scheduler: Scheduler, request_id: str = "long", **fields: Any) -> None:
    """A request that decodes on d1 from now on."""
    estimate = sent(scheduler, request_id, **{"prompt_tokens": 5000, **fields})
    assert pair_of(estimate) == ("p1", "d1")
    scheduler.apply(FirstToken(request_id), now=0.6)


def test_a_short_prompt_is_computed_where_it_is_decoded_and_a_long_one_is_handed_off() -> None:
    assert pair_of(sent(a_scheduler(), prompt_tokens=100)) == ALONE
    assert pair_of(sent(a_scheduler(), prompt_tokens=5000)) == ("p1", "d1")


def test_the_length_at_which_it_turns_follows_the_load_of_the_prefill_engines() -> None:
    def at(scheduler: Scheduler) -> tuple[str, str]:
        return pair_of(sent(scheduler, "probe", prompt_tokens=850, slo=Slo()))

    busy = a_scheduler()
    sent(busy, "first", prompt_tokens=8000, slo=Slo())
    assert (at(a_scheduler()), at(busy)) == (("p1", "d1"), ALONE)


def test_a_prompt_that_the_decode_engine_has_cached_is_not_computed_again_elsewhere() -> None:
    engines = a_mesh(1, 1, block_tokens=1000, kv_capacity_tokens=1_000_000)
    scheduler = a_scheduler(*engines)
    prompt = {"prompt_tokens": 5100, "block_hashes": {1000: hashes(1, 2, 3, 4, 5)}}
    assert pair_of(sent(a_scheduler(*engines), **prompt)) == ("p1", "d1")
    scheduler.apply(KvFeed("d1", FeedState.LIVE, ("d1",)), now=0.0)
    scheduler.apply(BlocksStored("d1", 1000, hashes(1, 2, 3, 4, 5)), now=0.0)
    estimate = sent(scheduler, **prompt)
    assert (pair_of(estimate), estimate.cached_tokens) == (ALONE, 5000)
    assert estimate.prefill_s == pytest.approx(0.01)


def test_the_prediction_holds_the_batch_that_it_is_mixed_into() -> None:
    scheduler = a_scheduler()
    decoding(scheduler)
    estimate = sent(scheduler, now=1.0, prompt_tokens=100)
    assert pair_of(estimate) == ALONE
    assert (estimate.hand_off_s, estimate.wait_s) == (0.0, 0.0)
    assert (estimate.prefill_s, estimate.stall_s) == (pytest.approx(0.01), pytest.approx(0.01))
    assert estimate.join_s == pytest.approx(1.5 * 0.02)


def test_nobodys_step_is_made_longer_than_his_bound() -> None:
    """300 tokens make the step 20 + 30 ms: fine for a bound of 100 ms, too long for a stream that asked for 40."""
    easy, strict = a_scheduler(), a_scheduler()
    decoding(easy)
    decoding(strict, slo=Slo(ttft_s=60.0, tbt_s=0.04))
    assert pair_of(sent(easy, now=1.0, prompt_tokens=300)) == ALONE
    assert pair_of(sent(strict, now=1.0, prompt_tokens=300)) == ("p1", "d1")
    assert pair_of(sent(strict, "short", now=1.0, prompt_tokens=100)) == ALONE


def test_prefills_that_would_be_in_one_step_count_together() -> None:
    scheduler = a_scheduler()
    decoding(scheduler)
    requests = [a_request(f"r{n}", arrived_at=1.0, prompt_tokens=300, slo=BOUND) for n in range(4)]
    decisions = [scheduler.decide(request, now=1.0) for request in requests]
    pairs = [pair_of(each.estimate) if isinstance(each, Dispatch) else None for each in decisions]
    assert pairs == [ALONE, ("p1", "d1"), None, None]


def test_a_hand_off_that_arrives_in_the_middle_of_such_a_prefill_waits_for_it() -> None:
    scheduler = a_scheduler()
    before = sent(scheduler, "before", prompt_tokens=1000, slo=Slo())
    assert pair_of(before) == ("p1", "d1")
    busy = a_scheduler(an_engine("p1", Role.PREFILL), an_engine("d1", Role.DECODE))
    alone = sent(busy, "alone", prompt_tokens=5000, can_hand_off=False, slo=Slo())
    assert pair_of(alone) == ALONE
    after = sent(busy, "after", prompt_tokens=1000, slo=Slo())
    assert pair_of(after) == ("p1", "d1")
    assert after.join_s - before.join_s == pytest.approx(0.5 - 0.1 - 0.05)


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"sluice"}))
def test_rules_that_do_not_weigh_it_are_not_offered_it(name: str) -> None:
    assert pair_of(sent(a_scheduler(policy=POLICIES[name]()), prompt_tokens=10)) == ("p1", "d1")


def test_it_can_be_switched_off() -> None:
    scheduler = a_scheduler(policy=Sluice(can_skip_hand_off=False))
    assert pair_of(sent(scheduler, prompt_tokens=10)) == ("p1", "d1")


def test_an_engine_that_cannot_is_never_asked_to() -> None:
    engines = [an_engine("p1", Role.PREFILL), an_engine("d1", Role.DECODE, can_serve_alone=False)]
    assert pair_of(sent(a_scheduler(*engines), prompt_tokens=10)) == ("p1", "d1")


@pytest.mark.parametrize(("tbt_s", "pair"), [(0.03, ("p1", "d1")), (0.1, ALONE)])
def test_a_bound_holds_whatever_rule_admits(tbt_s: float, pair: tuple[str, str]) -> None:
    """The core does not offer what would break it."""
    scheduler = a_scheduler(admission=AdmitAll())
    assert pair_of(sent(scheduler, prompt_tokens=300, slo=Slo(tbt_s=tbt_s))) == pair


def test_the_steps_that_a_prefill_made_longer_are_not_held_against_the_prediction() -> None:
    scheduler = a_scheduler()
    decoding(scheduler)
    sent(scheduler, now=1.0, prompt_tokens=300)
    reservation = scheduler.cluster.reservations["long"]
    scheduler.apply(FirstToken("r1"), now=1.06)
    released = scheduler.cluster.release("long", 9.0)
    assert released is reservation
    assert (reservation.stall_s, reservation.longest_stall_s) == (pytest.approx(0.03), pytest.approx(0.03))
    # One gap of fifty milliseconds among forty of twenty: the slowest four have a mean of 27.5 ms.
    finished = Finished("long", output_tokens=41, tbt_s=0.0275)
    assert slow_stall_s(reservation, finished) == pytest.approx(0.0075)
    short = Finished("long", output_tokens=5, tbt_s=0.05)
    assert slow_stall_s(reservation, short) == pytest.approx(0.025)


def test_nothing_stays_booked_when_it_is_over() -> None:
    scheduler = a_scheduler()
    assert pair_of(sent(scheduler, prompt_tokens=100)) == ALONE
    scheduler.cluster.check()
    scheduler.apply(FirstToken("r1"), now=0.1)
    scheduler.cluster.check()
    assert scheduler.cluster.engines["d1"].prefill_work_s(0.1) == 0.0
    scheduler.apply(Finished("r1", output_tokens=3), now=0.2)
    scheduler.cluster.check()
    assert (len(scheduler.cluster.rows), scheduler.cluster.engines["d1"].kv_tokens) == (0, 0)


def test_a_table_without_it_is_the_table_of_before() -> None:
    """Least work is offered two pairs, and both are hand-offs."""
    scheduler = a_scheduler(*a_mesh(1, 2), policy=LeastWork())
    scheduler.kept_candidates = 16
    sent(scheduler, prompt_tokens=10)
    found = scheduler.candidates["r1"]
    assert sorted(zip(found.prefill, found.decode, strict=True)) == [("p1", "d1"), ("p1", "d2")]
    assert np.isfinite(found.cost).all()
