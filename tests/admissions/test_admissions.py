"""Admission rules on one prefill and one or two decode engines whose times are round numbers."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from gateway.admissions import ADMISSIONS, DEFAULT_ADMISSION
from gateway.admissions.early import Early
from gateway.admissions.predicted import Predicted
from gateway.admissions.stage import Stage
from gateway.admissions.ttft import Ttft
from gateway.core.admission import AdmissionLimits
from gateway.core.events import EngineFound, EngineHealth, Finished, FirstToken, PrefillDone
from gateway.core.interfaces import Admission
from gateway.core.scheduler import Scheduler
from gateway.core.types import Decision, Dispatch, HandOff, Health, Reject, RejectReason, Role, Slo
from gateway.policies.least_work import LeastWork
from predictors.analytic import Analytic
from predictors.profile import WEAK_PRIOR
from tests.builders import a_request, an_engine

TIMES = replace(
    WEAK_PRIOR,
    prefill_base_s=2.0,
    prefill_s_per_token=1e-12,
    decode_base_s=0.01,
    decode_s_per_sequence=0.01,
    decode_s_per_kv_token=0.0,
    link_base_s=0.0,
    link_bytes_per_s=1e18,
)
"""A prefill takes 2 s, a decode step 10 ms and another 10 ms for each sequence in it."""
BOUNDS = Slo(ttft_s=5.0, tbt_s=0.025)
"""The second in the prefill queue is in time, the third is not; a step holds one sequence, two are too many."""


def a_scheduler(admission: Admission, *, decodes: int = 1) -> Scheduler:
    scheduler = Scheduler(
        policy=LeastWork(),
        predictor=Analytic(TIMES),
        limits=AdmissionLimits(),
        rng=random.Random(0),
        max_blocks=1024,
        admission=admission,
    )
    engines = [an_engine("p1", Role.PREFILL), *(an_engine(f"d{n}", Role.DECODE) for n in range(1, decodes + 1))]
    for engine in engines:
        scheduler.apply(EngineFound(engine), now=0.0)
        scheduler.apply(EngineHealth(engine.id, Health.UP), now=0.0)
    return scheduler


def decide(scheduler: Scheduler, request_id: str, *, now: float = 0.0, **fields: Any) -> Decision:
    return scheduler.decide(a_request(request_id, **{"arrived_at": now, "slo": BOUNDS, **fields}), now=now)


def reason(decision: Decision) -> RejectReason | None:
    return decision.reason if isinstance(decision, Reject) else None


@pytest.mark.parametrize("name", ADMISSIONS)
def test_who_asks_for_no_bound_is_never_refused(name: str) -> None:
    scheduler = a_scheduler(ADMISSIONS[name]())
    for number in range(20):
        assert isinstance(decide(scheduler, f"r{number}", slo=Slo()), Dispatch)


@pytest.mark.parametrize("name", [name for name in ADMISSIONS if name not in ("none", "sluice")])
def test_every_rule_of_the_paper_refuses_a_first_token_that_would_be_late(name: str) -> None:
    scheduler = a_scheduler(ADMISSIONS[name](), decodes=5)
    decisions = [decide(scheduler, f"r{number}", slo=Slo(ttft_s=5.0)) for number in range(4)]
    assert [reason(decision) for decision in decisions] == [None, None, RejectReason.TTFT_SLO, RejectReason.TTFT_SLO]


def test_the_default_rule_is_in_the_table() -> None:
    assert DEFAULT_ADMISSION in ADMISSIONS


def test_a_refusal_says_what_was_predicted_and_when_to_come_back() -> None:
    scheduler = a_scheduler(Ttft())
    decide(scheduler, "r1")
    decide(scheduler, "r2")
    refusal = decide(scheduler, "r3")
    assert isinstance(refusal, Reject)
    assert refusal.best is not None
    assert refusal.best.ttft_s == pytest.approx(6.0, abs=0.1)
    assert refusal.retry_after_s is not None
    assert 0.9 <= refusal.retry_after_s <= 3.1  # in time after 1 s, and it has the 2 s after that to itself
    assert "at most 5 s" in refusal.message


def test_who_comes_back_then_is_let_in() -> None:
    scheduler = a_scheduler(Ttft())
    for number in range(3):
        refusal = decide(scheduler, f"r{number}")
    assert isinstance(refusal, Reject)
    assert refusal.retry_after_s is not None
    assert isinstance(decide(scheduler, "again", now=refusal.retry_after_s), Dispatch)


def come_back(scheduler: Scheduler, crowd: int, *, obey: bool) -> tuple[int, int]:
    """Of a crowd at once those who were refused, and of them those admitted when they came back as told (else after
    a second); every prefill ends when it was predicted to."""
    refused: list[tuple[float, str]] = []
    for number in range(crowd):
        answer = decide(scheduler, f"r{number}", slo=Slo(ttft_s=5.0))
        if isinstance(answer, Reject):
            assert answer.retry_after_s is not None
            refused.append((answer.retry_after_s if obey else 1.0, f"r{number}"))
    running = list(scheduler.cluster.reservations)
    admitted, free_at = 0, 2.0
    for back_at, name in sorted(refused):
        while running and free_at <= back_at:
            scheduler.apply(PrefillDone(running[0]), now=free_at)
            scheduler.apply(Finished(running.pop(0)), now=free_at)
            free_at += 2.0
        free_at = free_at if running else back_at + 2.0
        if isinstance(decide(scheduler, f"{name}.2", now=back_at, slo=Slo(ttft_s=5.0)), Dispatch):
            running.append(f"{name}.2")
            admitted += 1
    return len(refused), admitted


def test_a_crowd_that_comes_back_when_told_is_let_in_and_one_that_does_not_is_not() -> None:
    refused, admitted = come_back(a_scheduler(Ttft(), decodes=40), 40, obey=True)
    assert refused == 38
    assert admitted >= 0.8 * refused
    refused, admitted = come_back(a_scheduler(Ttft(), decodes=40), 40, obey=False)
    assert admitted <= 0.1 * refused


def test_a_margin_makes_a_rule_stricter() -> None:
    scheduler = a_scheduler(Ttft(margin=2.0))
    assert [reason(decide(scheduler, f"r{n}")) for n in range(2)] == [None, RejectReason.TTFT_SLO]


def test_the_stage_rule_looks_at_decode_only_when_the_prefill_is_done() -> None:
    scheduler = a_scheduler(Stage())
    for request_id in ("r1", "r2"):
        assert isinstance(decide(scheduler, request_id), Dispatch)
    scheduler.apply(PrefillDone("r1", awaits_decode=True), now=2.0)
    assert scheduler.wake(now=2.0) == [HandOff("r1", "d1", 0.02)]
    assert scheduler.next_wakeup() is None
    scheduler.apply(PrefillDone("r2", awaits_decode=True), now=4.0)
    assert scheduler.next_wakeup() == 4.0
    (refusal,) = scheduler.wake(now=4.0)
    assert isinstance(refusal, Reject)
    assert (refusal.request_id, reason(refusal)) == ("r2", RejectReason.TBT_SLO)
    assert list(scheduler.cluster.reservations) == ["r1"]
    scheduler.cluster.check()


def test_early_rejection_goes_by_the_load_of_the_moment() -> None:
    scheduler = a_scheduler(Early())
    assert reason(decide(scheduler, "r1")) is None
    assert reason(decide(scheduler, "r2")) is None  # nobody decodes yet
    scheduler.apply(PrefillDone("r1"), now=2.0)
    assert reason(decide(scheduler, "r3", now=2.0)) is RejectReason.TBT_SLO


def test_prediction_counts_those_who_will_decode_by_then() -> None:
    scheduler = a_scheduler(Predicted(decode_s=60.0))
    assert reason(decide(scheduler, "r1")) is None
    assert reason(decide(scheduler, "r2")) is RejectReason.TBT_SLO


def test_prediction_takes_away_those_who_will_have_finished() -> None:
    scheduler = a_scheduler(Predicted(decode_s=1.0))
    assert reason(decide(scheduler, "r1")) is None
    assert reason(decide(scheduler, "r2")) is None  # r1 decodes from 2 s to 3 s, r2 from 4 s on


@pytest.mark.parametrize(("is_residual", "expected"), [(False, None), (True, RejectReason.TBT_SLO)])
def test_a_duration_is_read_literally_or_as_what_remains(is_residual: bool, expected: RejectReason | None) -> None:
    scheduler = a_scheduler(Predicted(decode_s=4.0, is_residual=is_residual))
    decide(scheduler, "r1")
    scheduler.apply(PrefillDone("r1"), now=2.0)
    scheduler.apply(FirstToken("r1"), now=2.0)
    # At 5 s r1 has decoded for 3 s. The new prefill ends at 7 s: literally r1 is over at 6 s, else at 9 s.
    assert reason(decide(scheduler, "r2", now=5.0)) is expected


def test_prediction_spreads_uniformly_over_the_decode_engines() -> None:
    scheduler = a_scheduler(Predicted(decode_s=60.0), decodes=2)
    decisions = [decide(scheduler, f"r{n}", slo=Slo(tbt_s=0.025)) for n in range(3)]
    assert [reason(decision) for decision in decisions] == [None, None, RejectReason.TBT_SLO]


@pytest.mark.parametrize("margin", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_margins_are_refused(margin: float) -> None:
    with pytest.raises(ValueError, match="margin"):
        Ttft(margin=margin)
    with pytest.raises(ValueError, match="margin"):
        Early(tbt_margin=margin)
    with pytest.raises(ValueError, match="decode_s"):
        Predicted(decode_s=0.0 if margin == 0.0 else margin)


@pytest.mark.parametrize("rule", [Early(), Predicted()], ids=["early", "predicted"])
def test_a_bound_on_the_mean_gap_bounds_the_step_too(rule: Admission) -> None:
    """A step of two sequences is 30 ms: a TPOT of 25 ms cannot be kept by it, whether or not a TBT was asked for."""
    scheduler = a_scheduler(rule)
    slo = Slo(ttft_s=60.0, tpot_s=0.025)
    assert isinstance(decide(scheduler, "r1", slo=slo), Dispatch)
    scheduler.apply(PrefillDone("r1"), now=2.0)
    scheduler.apply(FirstToken("r1"), now=2.0)
    assert reason(decide(scheduler, "r2", now=2.0, slo=slo)) is RejectReason.TBT_SLO
