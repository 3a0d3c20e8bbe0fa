from __future__ import annotations

import random

import pytest

from gateway.core.events import AttemptFailed, EngineHealth, Finished, FirstToken, Left, PrefillDone
from gateway.core.types import Dispatch, Health
from gateway.records import KEPT_CANDIDATES, Outcome, Recorder
from gateway.trace_context import Ids
from tests.builders import a_mesh, a_request, a_scheduler, an_estimate


def a_recorder(**settings) -> Recorder:
    return Recorder(**({"kept_count": 4, "unix_clock": lambda: 1000.0} | settings))


def begun(recorder: Recorder, request_id: str = "r1", client_id: str = "c1"):
    trail = recorder.begin(request_id, client_id, "/v1/chat/completions", [], now=1.0)
    trail.gathered(a_request(request_id, arrived_at=1.0), now=1.5)
    return trail


def sent(recorder: Recorder, request_id: str = "r1", *, attempt: int = 1, now: float = 2.0) -> None:
    dispatch = Dispatch(request_id, attempt, an_estimate())
    recorder.decided(dispatch, None, attempt=attempt, decision_s=0.001, now=now)


def finished(recorder: Recorder, trail, outcome: Outcome = Outcome.SERVED, now: float = 9.0):
    return recorder.finish(trail, outcome=outcome, reason="", status=200, now=now)


def test_a_record_is_what_events_told_in_their_order():
    recorder = a_recorder()
    trail = begun(recorder)
    sent(recorder)
    recorder.event(EngineHealth("p1", Health.UP), now=2.5)
    recorder.event(PrefillDone("r1", 110, 64), now=3.0)
    recorder.event(FirstToken("r1"), now=4.0)
    recorder.event(Finished("r1", output_tokens=7, tbt_s=0.2), now=8.0)
    record = finished(recorder, trail)
    (attempt,) = record.attempts
    assert (attempt.sent_at, attempt.prefilled_at, attempt.first_token_at, attempt.ended_at) == (2.0, 3.0, 4.0, 8.0)
    assert (record.ttft_s, record.tbt_s, record.output_tokens) == (3.0, 0.2, 7)
    assert record.cached_tokens == (0, 64)
    assert record.predicted_ttft_s == pytest.approx(1.0 + 1.15)
    assert record.unix_s(record.ended_at) == 1000.0
    assert recorder.open_count == 0


def test_a_retry_is_a_second_attempt_and_the_first_keeps_its_failure():
    recorder = a_recorder()
    trail = begun(recorder)
    sent(recorder)
    recorder.event(AttemptFailed("r1", "p1", "prefill_lost"), now=3.0)
    sent(recorder, attempt=2, now=3.0)
    recorder.event(Left("r1"), now=5.0)
    first, second = finished(recorder, trail, Outcome.CLIENT_LEFT).attempts
    assert (first.failure, first.engine_at_fault, first.ended_at) == ("prefill_lost", "p1", 3.0)
    assert (second.number, second.failure, second.ended_at) == (2, None, 5.0)


def test_a_finished_record_does_not_change():
    recorder = a_recorder()
    trail = begun(recorder)
    sent(recorder)
    record = finished(recorder, trail)
    recorder.event(FirstToken("r1"), now=9.5)
    sent(recorder, attempt=2)
    assert record.last is not None
    assert (len(record.attempts), record.last.first_token_at) == (1, None)


def test_the_ring_is_bounded_and_found_by_either_id():
    recorder = a_recorder()
    for number in range(10):
        finished(recorder, begun(recorder, f"r{number}", f"c{number}"))
    assert [record.id for record in recorder.latest()] == ["r9", "r8", "r7", "r6"]
    assert recorder.find("c9") is recorder.find("r9") is not None
    assert recorder.find("r5") is None
    assert recorder.find("c5") is None
    assert len(recorder._by_client_id) == 4


def test_of_requests_that_share_a_client_id_the_latest_is_found():
    recorder = a_recorder()
    for number in range(6):
        finished(recorder, begun(recorder, f"r{number}", "same"))
    found = recorder.find("same")
    assert found is not None
    assert found.id == "r5"


def test_an_observer_that_fails_keeps_the_others_from_nothing():
    recorder, seen = a_recorder(), []

    def fails(record):
        raise ValueError("no")

    recorder.observers += [fails, seen.append]
    record = finished(recorder, begun(recorder))
    assert seen == [record]


def test_legs_have_spans_of_their_own_only_where_somebody_will_see_them():
    for ratio, is_own in ((1.0, True), (0.0, False)):
        recorder = a_recorder(ids=Ids(sample_ratio=ratio, rng=random.Random(1)))
        trail = begun(recorder)
        sent(recorder)
        assert trail.trace is not None
        legs = {trail.leg_span_id("prefill"), trail.leg_span_id("decode")}
        assert (trail.trace.span_id not in legs and len(legs) == 2) is is_own
        assert (legs == {trail.trace.span_id}) is not is_own


def test_the_scheduler_keeps_the_best_pairs_of_the_last_decision_when_asked():
    scheduler = a_scheduler(*a_mesh(5, 5))
    scheduler.decide(a_request("r0"), now=0.0)
    assert scheduler.candidates == {}
    scheduler.kept_candidates = KEPT_CANDIDATES
    decision = scheduler.decide(a_request("r1"), now=0.0)
    assert isinstance(decision, Dispatch)
    assert set(scheduler.candidates) == {"r1"}
    kept = scheduler.candidates["r1"]
    assert (kept.pair_count, len(kept)) == (25, KEPT_CANDIDATES)
    assert (kept.prefill[0], kept.decode[0]) == (decision.estimate.prefill, decision.estimate.decode)
    assert list(kept.cost) == sorted(kept.cost)
    assert kept.ttft_s[0] == pytest.approx(decision.estimate.ttft_s)
