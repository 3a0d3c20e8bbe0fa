"""The one door: dispatches, waits, refusals, and what events do to them."""

import numpy as np
import pytest

from gateway.core.blocks import hash_prompt
from gateway.core.events import (
    AttemptFailed,
    BlocksStored,
    EngineFound,
    EngineHealth,
    EngineLost,
    FeedState,
    Finished,
    FirstToken,
    KvFeed,
    Left,
    PrefillDone,
)
from gateway.core.scheduler import Scheduler
from gateway.core.types import BlockHashes, Dispatch, Health, Reject, RejectReason, Role, Slo, Wait
from tests.builders import a_mesh, a_pair, a_request, a_scheduler, an_engine


def pair_of(decision: object) -> tuple[str, str]:
    assert isinstance(decision, Dispatch)
    return decision.estimate.prefill, decision.estimate.decode


def reason_of(decision: object) -> RejectReason:
    assert isinstance(decision, Reject)
    return decision.reason


def test_a_request_goes_to_a_prefill_and_a_decode_engine() -> None:
    assert pair_of(a_scheduler(*a_pair()).decide(a_request(), now=0.0)) == ("p1", "d1")


def test_an_engine_of_role_both_serves_alone() -> None:
    assert pair_of(a_scheduler(an_engine("e1")).decide(a_request(), now=0.0)) == ("e1", "e1")


def test_the_second_request_goes_where_the_first_did_not() -> None:
    scheduler = a_scheduler(*a_mesh(2, 2))
    first = pair_of(scheduler.decide(a_request("r1"), now=0.0))
    second = pair_of(scheduler.decide(a_request("r2"), now=0.0))
    assert (first, second) == (("p1", "d1"), ("p2", "d2"))


def test_a_dispatch_names_the_next_best_pairs() -> None:
    decision = a_scheduler(*a_mesh(2, 2)).decide(a_request(), now=0.0)
    assert isinstance(decision, Dispatch)
    assert len(decision.runners_up) == 3
    assert decision.estimate not in decision.runners_up


def test_engines_of_different_pools_never_pair() -> None:
    scheduler = a_scheduler(
        an_engine("p1", Role.PREFILL, pool="a"),
        an_engine("d1", Role.DECODE, pool="b"),
        an_engine("d2", Role.DECODE, pool="a"),
    )
    for number in range(4):
        assert pair_of(scheduler.decide(a_request(f"r{number}"), now=0.0)) == ("p1", "d2")


def test_a_request_whose_kv_cannot_move_is_served_by_a_decode_engine_alone() -> None:
    decision = a_scheduler(*a_pair()).decide(a_request(can_hand_off=False), now=0.0)
    assert pair_of(decision) == ("d1", "d1")


def test_it_is_refused_where_no_engine_can_serve_alone() -> None:
    prefill = an_engine("p1", Role.PREFILL)
    decode = an_engine("d1", Role.DECODE, can_serve_alone=False)
    decision = a_scheduler(prefill, decode).decide(a_request(can_hand_off=False), now=0.0)
    assert isinstance(decision, Reject)


@pytest.mark.parametrize(
    ("missing", "reason"), [("p1", RejectReason.NO_PREFILL), ("d1", RejectReason.NO_DECODE)], ids=["prefill", "decode"]
)
def test_a_missing_role_is_named(missing: str, reason: RejectReason) -> None:
    scheduler = a_scheduler(*a_pair())
    scheduler.apply(EngineHealth(missing, Health.DOWN), now=1.0)
    assert reason_of(scheduler.decide(a_request(), now=1.0)) is reason


def test_an_engine_that_was_never_probed_is_no_candidate() -> None:
    scheduler = a_scheduler(*a_pair(), health=Health.UNKNOWN)
    assert isinstance(scheduler.decide(a_request(), now=0.0), Reject)


def test_a_draining_engine_gets_nothing_new() -> None:
    scheduler = a_scheduler(*a_mesh(2, 1))
    scheduler.apply(EngineHealth("p1", Health.DRAINING), now=0.0)
    assert pair_of(scheduler.decide(a_request(), now=0.0)) == ("p2", "d1")


def test_an_unknown_model_is_refused_with_the_known_ones() -> None:
    decision = a_scheduler(*a_pair()).decide(a_request(model="other"), now=0.0)
    assert isinstance(decision, Reject)
    assert decision.reason is RejectReason.UNKNOWN_MODEL
    assert "`other`" in decision.message
    assert decision.message.endswith(": m")


def test_a_model_whose_engines_are_all_down_is_not_unknown() -> None:
    scheduler = a_scheduler(*a_pair())
    scheduler.apply(EngineHealth("d1", Health.DOWN), now=0.0)
    assert reason_of(scheduler.decide(a_request(model="m"), now=0.0)) is RejectReason.NO_DECODE


def test_an_engine_that_did_not_tell_its_models_may_serve_any() -> None:
    scheduler = a_scheduler(an_engine("e1", models=()))
    assert pair_of(scheduler.decide(a_request(model="whatever"), now=0.0)) == ("e1", "e1")


def test_a_prompt_counted_exactly_and_too_long_is_refused_and_an_estimate_is_not() -> None:
    scheduler = a_scheduler(an_engine("e1", max_model_tokens=100))
    too_long = a_request("r1", prompt_tokens=101, is_prompt_exact=True)
    assert reason_of(scheduler.decide(too_long, now=0.0)) is RejectReason.PROMPT_TOO_LONG
    assert isinstance(scheduler.decide(a_request("r2", prompt_tokens=101), now=0.0), Dispatch)


@pytest.mark.parametrize("avoid", [("p1", "d1"), ("d1", "p1")])
def test_an_engine_without_an_alternative_is_taken_again_and_the_others_are_still_avoided(avoid) -> None:
    scheduler = a_scheduler(*a_mesh(2, 1))
    assert pair_of(scheduler.decide(a_request(attempt=2, avoid=avoid), now=0.0)) == ("p2", "d1")


def test_a_retry_avoids_the_engine_that_failed_it() -> None:
    scheduler = a_scheduler(*a_mesh(2, 1))
    assert pair_of(scheduler.decide(a_request(), now=0.0)) == ("p1", "d1")
    scheduler.apply(AttemptFailed("r1", "p1", "lost"), now=1.0)
    assert pair_of(scheduler.decide(a_request(attempt=2, avoid=("p1",)), now=1.0)) == ("p2", "d1")


def test_the_engine_that_failed_is_used_again_when_it_is_the_only_one() -> None:
    scheduler = a_scheduler(*a_pair())
    assert pair_of(scheduler.decide(a_request(attempt=2, avoid=("p1", "d1")), now=0.0)) == ("p1", "d1")


def test_attempts_are_bounded() -> None:
    scheduler = a_scheduler(*a_pair(), max_attempts=2)
    assert reason_of(scheduler.decide(a_request(attempt=3), now=0.0)) is RejectReason.TOO_MANY_ATTEMPTS


# ---- waiting ---------------------------------------------------------------------------------------------------------


def a_full_scheduler(**limits: float) -> Scheduler:
    """One engine with room for one, which `running` has."""
    scheduler = a_scheduler(an_engine("e1"), **{"max_in_flight_per_engine": 1, **limits})
    assert isinstance(scheduler.decide(a_request("running"), now=0.0), Dispatch)
    return scheduler


def test_a_request_waits_when_every_engine_is_full() -> None:
    scheduler = a_full_scheduler(max_wait_s=5.0)
    decision = scheduler.decide(a_request("r1", arrived_at=1.0), now=1.0)
    assert isinstance(decision, Wait)
    assert decision.until_at == 6.0 == scheduler.next_wakeup()


@pytest.mark.parametrize("end", [Finished("running"), Left("running"), AttemptFailed("running", None, "x")], ids=repr)
def test_the_first_to_arrive_is_sent_when_room_appears(end: Finished | Left | AttemptFailed) -> None:
    scheduler = a_full_scheduler()
    scheduler.decide(a_request("second", arrived_at=2.0), now=2.0)
    scheduler.decide(a_request("first", arrived_at=1.0), now=2.0)
    scheduler.apply(end, now=3.0)
    assert scheduler.next_wakeup() == 3.0
    assert [decision.request_id for decision in scheduler.wake(now=3.0)] == ["first"]
    assert scheduler.waiting_count == 1


def test_an_engine_that_comes_up_serves_those_who_wait() -> None:
    scheduler = a_full_scheduler()
    scheduler.decide(a_request("r1"), now=0.0)
    scheduler.apply(EngineFound(an_engine("e2")), now=1.0)
    scheduler.apply(EngineHealth("e2", Health.UP), now=1.0)
    assert [pair_of(decision) for decision in scheduler.wake(now=1.0)] == [("e2", "e2")]


def test_a_wait_that_is_over_ends_in_a_refusal_with_a_time_to_come_back() -> None:
    scheduler = a_full_scheduler(max_wait_s=5.0)
    scheduler.decide(a_request("r1"), now=0.0)
    (decision,) = scheduler.wake(now=5.0)
    assert isinstance(decision, Reject)
    assert decision.reason is RejectReason.WAITED_TOO_LONG
    assert decision.retry_after_s is not None
    assert 5.0 <= decision.retry_after_s <= 5.0 + 5.0 / scheduler.limits.max_waiting
    assert scheduler.next_wakeup() is None


def test_a_full_queue_refuses_and_retry_after_follows_the_pace_of_finishes() -> None:
    scheduler = a_full_scheduler(max_waiting=1)
    for number in range(3):
        scheduler.apply(Finished("running"), now=2.0 * number)
        scheduler.decide(a_request("running", arrived_at=2.0 * number), now=2.0 * number)
    scheduler.decide(a_request("waits", arrived_at=5.0), now=5.0)
    decision = scheduler.decide(a_request("refused", arrived_at=5.0), now=5.0)
    assert isinstance(decision, Reject)
    assert decision.reason is RejectReason.QUEUE_FULL
    assert decision.retry_after_s is not None
    assert 4.0 <= decision.retry_after_s <= 6.0  # it is the second in line, and one goes every two seconds


def test_one_who_left_while_waiting_is_never_named_again() -> None:
    scheduler = a_full_scheduler()
    scheduler.decide(a_request("r1"), now=0.0)
    scheduler.apply(Left("r1"), now=1.0)
    scheduler.apply(Finished("running"), now=2.0)
    assert scheduler.wake(now=2.0) == []


def test_a_model_without_room_does_not_hold_up_another() -> None:
    engines = an_engine("a", models=("full",)), an_engine("b", models=("free",))
    scheduler = a_scheduler(*engines, max_in_flight_per_engine=1)
    scheduler.decide(a_request("r1", model="full"), now=0.0)
    scheduler.decide(a_request("r2", model="free"), now=0.0)
    scheduler.decide(a_request("w1", model="full"), now=0.0)
    scheduler.decide(a_request("w2", model="free", arrived_at=1.0), now=1.0)
    scheduler.apply(Finished("r2"), now=2.0)
    assert [pair_of(decision) for decision in scheduler.wake(now=2.0)] == [("b", "b")]


def test_those_who_wait_are_refused_when_the_last_engine_goes_down() -> None:
    scheduler = a_full_scheduler()
    scheduler.decide(a_request("r1"), now=0.0)
    scheduler.apply(EngineHealth("e1", Health.DOWN), now=1.0)
    assert [reason_of(decision) for decision in scheduler.wake(now=1.0)] == [RejectReason.NO_DECODE]


def test_a_newcomer_does_not_overtake_those_who_wait_for_the_same_engines() -> None:
    scheduler = a_full_scheduler()
    scheduler.decide(a_request("waits"), now=0.0)
    scheduler.apply(Finished("running"), now=1.0)
    assert isinstance(scheduler.decide(a_request("newcomer", arrived_at=1.0), now=1.0), Wait)
    assert scheduler.next_wakeup() == 1.0
    assert [decision.request_id for decision in scheduler.wake(now=1.0)] == ["waits"]


def test_a_request_that_can_no_longer_keep_its_bound_is_refused_at_once() -> None:
    scheduler = a_full_scheduler(max_wait_s=30.0)
    scheduler.decide(a_request("r1", slo=Slo(ttft_s=2.0)), now=0.0)
    assert scheduler.next_wakeup() == 2.0
    assert [reason_of(decision) for decision in scheduler.wake(now=2.0)] == [RejectReason.TTFT_SLO]


def test_best_effort_gives_up_its_place_in_a_full_queue() -> None:
    scheduler = a_full_scheduler(max_waiting=1)
    scheduler.decide(a_request("any time"), now=0.0)
    assert isinstance(scheduler.decide(a_request("soon", slo=Slo(ttft_s=9.0)), now=0.0), Wait)
    (decision,) = scheduler.wake(now=0.0)
    assert (decision.request_id, reason_of(decision)) == ("any time", RejectReason.QUEUE_FULL)


def test_tenants_that_wait_are_sent_by_weight_and_what_was_decoded_counts() -> None:
    scheduler = a_scheduler(an_engine("e1"), max_in_flight_per_engine=1, max_wait_s=1e6, weights={"b": 2.0})
    for number in range(30):
        scheduler.decide(a_request(f"a{number}", tenant="a"), now=0.0)
        scheduler.decide(a_request(f"b{number}", tenant="b"), now=0.0)
    sent = ["a0"]
    for number in range(1, 30):
        scheduler.apply(Finished(sent[-1], output_tokens=200), now=float(number))
        sent += [decision.request_id for decision in scheduler.wake(now=float(number))]
    assert sum(name.startswith("b") for name in sent) == pytest.approx(20, abs=1)


# ---- prefixes --------------------------------------------------------------------------------------------------------


def hashes(count: int) -> BlockHashes:
    return hash_prompt(np.arange(16 * count), 16)


def announce(scheduler: Scheduler, engine_id: str, blocks: BlockHashes) -> None:
    scheduler.apply(KvFeed(engine_id, FeedState.LIVE, (engine_id,)), now=0.0)
    scheduler.apply(BlocksStored(engine_id, 16, blocks), now=0.0)


def test_a_request_goes_where_its_prefix_is() -> None:
    scheduler = a_scheduler(*a_mesh(2, 1, block_tokens=16))
    announce(scheduler, "p2", hashes(200))
    decision = scheduler.decide(a_request(prompt_tokens=4000, block_hashes={16: hashes(250)}), now=0.0)
    assert pair_of(decision) == ("p2", "d1")
    assert isinstance(decision, Dispatch)
    assert decision.estimate.cached_tokens == 3200


def test_an_engine_that_left_and_came_back_has_nothing_cached() -> None:
    scheduler = a_scheduler(an_engine("e1", block_tokens=16))
    announce(scheduler, "e1", hashes(2))
    scheduler.apply(EngineLost("e1"), now=1.0)
    scheduler.apply(EngineFound(an_engine("e1", block_tokens=16)), now=2.0)
    scheduler.apply(EngineHealth("e1", Health.UP), now=2.0)
    decision = scheduler.decide(a_request(block_hashes={16: hashes(2)}), now=2.0)
    assert isinstance(decision, Dispatch)
    assert decision.estimate.cached_tokens == 0


def test_the_block_sizes_in_use_are_those_of_the_engines() -> None:
    engines = an_engine("a", block_tokens=128), an_engine("b", block_tokens=16), an_engine("c", block_tokens=16)
    assert a_scheduler(*engines, an_engine("unknown")).block_sizes == (16, 128)


# ---- learning --------------------------------------------------------------------------------------------------------


def test_prefills_that_take_longer_raise_the_prediction() -> None:
    scheduler = a_scheduler(*a_pair())
    before = scheduler.decide(a_request("probe"), now=0.0)
    scheduler.apply(Left("probe"), now=0.0)
    for number in range(30):
        now = 100.0 * number
        scheduler.decide(a_request(f"r{number}"), now=now)
        scheduler.apply(PrefillDone(f"r{number}"), now=now + 20.0)
        scheduler.apply(FirstToken(f"r{number}"), now=now + 21.0)
        scheduler.apply(Finished(f"r{number}", tbt_s=0.5), now=now + 30.0)
    after = scheduler.decide(a_request("again"), now=5000.0)
    assert isinstance(before, Dispatch)
    assert isinstance(after, Dispatch)
    assert after.estimate.prefill_s == pytest.approx(20.0, rel=0.1)
    assert after.estimate.prefill_s > before.estimate.prefill_s
    assert after.estimate.tbt_s > before.estimate.tbt_s


def test_a_hand_off_shorter_than_the_join_was_predicted_is_learnt_all_the_same() -> None:
    scheduler = a_scheduler(*a_pair())
    for number in range(60):
        now = 100.0 * number
        scheduler.decide(a_request(f"r{number}"), now=now)
        scheduler.apply(PrefillDone(f"r{number}"), now=now + 1.0)
        scheduler.apply(FirstToken(f"r{number}"), now=now + 1.01)
        scheduler.apply(Finished(f"r{number}", tbt_s=0.5), now=now + 30.0)
    after = scheduler.decide(a_request("again"), now=7000.0)
    assert isinstance(after, Dispatch)
    assert after.estimate.join_s == pytest.approx(0.5, rel=0.1)
    assert after.estimate.hand_off_s < 0.001


def test_events_about_the_unknown_are_ignored() -> None:
    scheduler = a_scheduler(*a_pair())
    for event in (PrefillDone("x"), FirstToken("x"), Finished("x"), Left("x"), EngineLost("x")):
        scheduler.apply(event, now=1.0)
    scheduler.cluster.check()
