from __future__ import annotations

from typing import Any

from gateway.core.events import EngineReport, Finished, PeerGone, PeerHolds, PeerMoved, PeerSent, PeerStage
from gateway.core.scheduler import Scheduler
from gateway.core.types import Dispatch, Report, Role, Wait
from tests.builders import a_pair, a_request, a_scheduler, an_engine, an_estimate, hashes

LEASE_S = 5.0


def sent(number: int = 1, *, owner: str = "g2", epoch: int = 1, age_s: float = 0.0, **fields: Any) -> PeerSent:
    request = a_request("not its name", block_hashes=fields.pop("block_hashes", {}))
    return PeerSent(owner, epoch, number, request, an_estimate(**fields), 0, age_s, LEASE_S)


def moved(stage: PeerStage, number: int = 1, *, epoch: int = 1, output_tokens: int = 0) -> PeerMoved:
    return PeerMoved("g2", epoch, number, stage, output_tokens)


def told(*events: Any, scheduler: Scheduler | None = None, now: float = 0.0) -> Scheduler:
    scheduler = scheduler or a_scheduler(*a_pair())
    for event in events:
        scheduler.apply(event, now=now)
    return scheduler


def counts(scheduler: Scheduler) -> tuple[int, int]:
    scheduler.cluster.check()
    return tuple(scheduler.cluster.engines[name].own_count for name in ("p1", "d1"))  # type: ignore[return-value]


def test_what_another_gateway_sent_is_booked_on_both_engines_until_it_is_over():
    scheduler = told(sent())
    assert counts(scheduler) == (1, 1)
    told(moved(PeerStage.PREFILLED), scheduler=scheduler)
    assert counts(scheduler) == (0, 1)
    told(moved(PeerStage.PRODUCING, output_tokens=40), scheduler=scheduler)
    assert scheduler.cluster.engines["d1"].kv_tokens == 140
    told(moved(PeerStage.FINISHED), scheduler=scheduler)
    assert counts(scheduler) == (0, 0)


def test_what_another_gateway_decodes_counts_in_the_batch_that_is_there():
    scheduler = told(sent())
    rows, number = scheduler.cluster.rows, scheduler.cluster.engines["d1"].number
    assert rows.present(scheduler.cluster.number_count)[0][number] == 0
    told(moved(PeerStage.PREFILLED), scheduler=scheduler)
    assert rows.present(scheduler.cluster.number_count)[0][number] == 1


def test_a_dispatch_told_twice_is_one():
    assert counts(told(sent(), sent())) == (1, 1)


def test_a_release_told_twice_or_of_something_unknown_changes_nothing():
    scheduler = told(sent(1), sent(2), *[moved(PeerStage.GIVEN_UP)] * 3, moved(PeerStage.FINISHED, number=77))
    assert counts(scheduler) == (1, 1)


def test_names_of_peers_never_meet_our_own_requests():
    scheduler = told(sent(1), sent(1, owner="g3"))
    assert isinstance(scheduler.decide(a_request("1@g2#1x"), now=0.0), Dispatch)
    assert counts(scheduler) == (3, 3)


def test_an_owner_without_a_sign_loses_its_reservations_by_time():
    scheduler = told(sent(1), sent(2))
    assert scheduler.next_wakeup() == LEASE_S
    scheduler.wake(now=LEASE_S - 0.01)
    assert counts(scheduler) == (2, 2)
    scheduler.wake(now=LEASE_S)
    assert counts(scheduler) == (0, 0)
    assert scheduler.next_wakeup() is None
    assert scheduler.leases.counts.expired == 2


def test_a_sign_lets_them_stand_and_ends_those_it_does_not_name():
    scheduler = told(sent(1), sent(2))
    told(PeerHolds("g2", 1, (2,), LEASE_S), scheduler=scheduler, now=4.0)
    assert counts(scheduler) == (1, 1)
    scheduler.wake(now=8.0)
    assert counts(scheduler) == (1, 1)
    assert scheduler.leases.counts.reconciled == 1


def test_reservations_that_are_named_and_not_known_are_counted_as_missing():
    assert told(sent(1), PeerHolds("g2", 1, (1, 2, 3), LEASE_S)).leases.missing_from("g2") == 2


def test_a_goodbye_ends_everything_at_once():
    assert counts(told(sent(1), sent(2), PeerGone("g2", 1))) == (0, 0)


def test_a_new_epoch_voids_the_one_before_and_whatever_is_still_said_under_it():
    scheduler = told(sent(1), sent(2), sent(1, epoch=2))
    assert counts(scheduler) == (1, 1)
    late = moved(PeerStage.FINISHED), sent(9), PeerHolds("g2", 1, (), LEASE_S), PeerGone("g2", 1)
    told(*late, scheduler=scheduler)
    assert counts(scheduler) == (1, 1)
    assert scheduler.leases.counts.fenced == len(late)


def test_an_owner_that_was_given_up_and_wakes_cannot_release_what_is_not_its_own():
    scheduler = told(sent(1))
    scheduler.wake(now=LEASE_S)
    told(sent(1, owner="g3"), moved(PeerStage.FINISHED), scheduler=scheduler, now=LEASE_S)
    assert counts(scheduler) == (1, 1)


def test_a_request_that_a_report_counted_as_a_strangers_counts_once_when_its_owner_is_heard():
    scheduler = told(EngineReport("d1", Report(running_count=3, waiting_count=0)))
    assert scheduler.cluster.engines["d1"].in_flight_count == 3
    told(sent(1, age_s=2.0), sent(2, age_s=2.0), scheduler=scheduler, now=1.0)
    assert scheduler.cluster.engines["d1"].in_flight_count == 3
    told(sent(3, age_s=0.5), scheduler=scheduler, now=1.0)  # sent after the report: it cannot have counted it
    assert scheduler.cluster.engines["d1"].in_flight_count == 4


def test_a_report_does_not_count_peers_again():
    scheduler = told(sent(1), sent(2), EngineReport("d1", Report(running_count=2, waiting_count=0)))
    assert scheduler.cluster.engines["d1"].in_flight_count == 2


def test_room_that_a_peer_leaves_wakes_a_request_that_waits():
    scheduler = a_scheduler(an_engine("b1"), max_in_flight_per_engine=1)
    told(sent(prefill="b1", decode="b1"), scheduler=scheduler)
    assert isinstance(scheduler.decide(a_request(), now=0.0), Wait)
    told(moved(PeerStage.FINISHED), scheduler=scheduler, now=1.0)
    assert scheduler.next_wakeup() == 1.0
    assert isinstance(scheduler.wake(now=1.0)[0], Dispatch)


def test_a_lease_that_ends_lets_a_waiting_request_in_at_that_very_wake():
    scheduler = a_scheduler(an_engine("b1"), max_in_flight_per_engine=1)
    told(sent(prefill="b1", decode="b1"), scheduler=scheduler)
    scheduler.decide(a_request(), now=0.0)
    assert isinstance(scheduler.wake(now=LEASE_S)[0], Dispatch)


def test_a_prompt_sent_by_a_peer_is_about_to_be_cached_there():
    engines = an_engine("p1", Role.PREFILL, block_tokens=16, kv_capacity_tokens=16_000), an_engine("d1", Role.DECODE)
    blocks = {16: hashes(*range(1, 7))}
    scheduler = told(sent(block_hashes=blocks), scheduler=a_scheduler(*engines))
    cached = scheduler.prefixes.cached_tokens(a_request(block_hashes=blocks), engines[:1])
    assert cached.tolist() == [96]
    told(moved(PeerStage.GIVEN_UP), scheduler=scheduler)
    assert scheduler.prefixes.cached_tokens(a_request(block_hashes=blocks), engines[:1]).tolist() == [0]


def test_a_peers_load_changes_where_the_next_request_goes():
    engines = [an_engine("b1"), an_engine("b2")]
    scheduler = a_scheduler(*engines)
    first = scheduler.decide(a_request("r1"), now=0.0)
    assert isinstance(first, Dispatch)
    scheduler.apply(Finished("r1"), now=0.0)
    told(sent(prefill="b1", decode="b1", prefill_s=9.0), scheduler=scheduler)
    second = scheduler.decide(a_request("r2"), now=0.0)
    assert isinstance(second, Dispatch)
    assert (first.estimate.prefill, second.estimate.prefill) == ("b1", "b2")
