"""The ledger: reservations are taken and given back exactly, others' load comes from reports."""

import pytest

from gateway.core.cluster import Cluster
from gateway.core.types import Report, Role
from tests.builders import a_dispatch, a_pair, a_request, an_engine


@pytest.fixture
def cluster() -> Cluster:
    cluster = Cluster()
    for engine in a_pair():
        cluster.found(engine)
    return cluster


def reserve(cluster: Cluster, request_id: str, now: float = 0.0, **estimate: object) -> None:
    cluster.reserve(a_request(request_id), a_dispatch(request_id, **estimate), now)


def test_a_dispatch_is_booked_on_both_engines(cluster: Cluster) -> None:
    reserve(cluster, "r1")
    assert cluster.engines["p1"].load(0.0).queued_tokens == 100
    assert cluster.engines["d1"].load(0.0).kv_tokens == 100
    assert [cluster.engines[name].in_flight_count for name in ("p1", "d1")] == [1, 1]


def test_the_end_of_the_prefill_frees_the_prefill_engine_only(cluster: Cluster) -> None:
    reserve(cluster, "r1")
    assert cluster.prefill_done("r1", 1.0) is not None
    assert [cluster.engines[name].in_flight_count for name in ("p1", "d1")] == [0, 1]


def test_the_end_of_a_prefill_told_twice_counts_once(cluster: Cluster) -> None:
    reserve(cluster, "r1")
    cluster.prefill_done("r1", 1.0)
    assert cluster.prefill_done("r1", 2.0) is None
    cluster.check()


def test_output_tokens_grow_the_kv_and_all_of_it_is_given_back(cluster: Cluster) -> None:
    reserve(cluster, "r1")
    cluster.progressed("r1", 1, 1.0)
    cluster.progressed("r1", 40, 2.0)
    assert cluster.engines["d1"].load(2.0).kv_tokens == 140
    assert cluster.engines["d1"].load(2.0).decoding_count == 1
    cluster.release("r1", 3.0)
    assert cluster.engines["d1"].load(3.0).kv_tokens == 0
    assert cluster.engines["d1"].load(3.0).decoding_count == 0


def test_a_release_told_twice_or_of_nobody_changes_nothing(cluster: Cluster) -> None:
    reserve(cluster, "r1")
    assert cluster.release("r1", 1.0) is not None
    assert cluster.release("r1", 1.0) is None
    assert cluster.release("nobody", 1.0) is None
    cluster.check()


def test_a_request_is_never_booked_twice(cluster: Cluster) -> None:
    reserve(cluster, "r1")
    with pytest.raises(AssertionError):
        reserve(cluster, "r1")


def test_prefill_work_counts_down_while_the_head_runs_and_stops_at_what_was_predicted(cluster: Cluster) -> None:
    reserve(cluster, "r1", now=0.0, prefill_s=2.0)
    reserve(cluster, "r2", now=0.5, prefill_s=3.0)
    assert cluster.engines["p1"].prefill_work_s(1.0) == pytest.approx(4.0)
    assert cluster.engines["p1"].prefill_work_s(9.0) == pytest.approx(3.0)


def test_the_next_prefill_starts_to_count_down_when_the_head_is_done(cluster: Cluster) -> None:
    reserve(cluster, "r1", now=0.0, prefill_s=2.0)
    reserve(cluster, "r2", now=0.0, prefill_s=3.0)
    cluster.prefill_done("r1", 4.0)
    assert cluster.engines["p1"].prefill_work_s(5.0) == pytest.approx(2.0)


def test_a_prefill_was_busy_from_the_end_of_the_one_before_it(cluster: Cluster) -> None:
    reserve(cluster, "r1", now=0.0)
    reserve(cluster, "r2", now=1.0)
    first, second = cluster.prefill_done("r1", 4.0), cluster.prefill_done("r2", 9.0)
    assert first is not None
    assert second is not None
    assert (first.prefill_busy_s, second.prefill_busy_s) == (4.0, 5.0)


def test_a_report_shows_the_load_of_others_beyond_ours(cluster: Cluster) -> None:
    reserve(cluster, "r1")
    cluster.reported("d1", Report(running_count=3, waiting_count=2), 1.0)
    assert cluster.engines["d1"].in_flight_count == 5


def test_a_report_taken_before_our_request_ended_is_not_others_load(cluster: Cluster) -> None:
    reserve(cluster, "r1")
    cluster.release("r1", 1.0)
    cluster.reported("d1", Report(running_count=1, waiting_count=0), 1.01)
    assert cluster.engines["d1"].in_flight_count == 0


def test_others_load_stays_when_reports_stop_and_their_age_grows(cluster: Cluster) -> None:
    cluster.reported("d1", Report(running_count=3, waiting_count=0), 1.0)
    load = cluster.engines["d1"].load(100.0)
    assert (load.in_flight_count, load.report_age_s) == (3, 99.0)


def test_an_engine_that_never_reported_says_so(cluster: Cluster) -> None:
    load = cluster.engines["d1"].load(5.0)
    assert (load.report, load.report_age_s) == (None, None)


def test_new_facts_about_an_engine_keep_its_load(cluster: Cluster) -> None:
    reserve(cluster, "r1")
    cluster.found(an_engine("p1", Role.PREFILL, block_tokens=16))
    assert cluster.engines["p1"].in_flight_count == 1
    assert cluster.engines["p1"].engine.block_tokens == 16


def test_requests_of_an_engine_that_left_are_released_without_it(cluster: Cluster) -> None:
    reserve(cluster, "r1")
    cluster.lost("p1")
    cluster.release("r1", 1.0)
    cluster.check()
    assert cluster.engines["d1"].in_flight_count == 0


def test_an_engine_that_left_and_came_back_does_not_inherit_old_reservations(cluster: Cluster) -> None:
    reserve(cluster, "r1")
    cluster.lost("d1")
    cluster.found(an_engine("d1", Role.DECODE))
    cluster.progressed("r1", 5, 1.0)
    cluster.release("r1", 2.0)
    cluster.check()
    assert cluster.engines["d1"].in_flight_count == 0


def test_one_engine_that_does_both_stages_counts_a_request_once() -> None:
    cluster = Cluster()
    cluster.found(an_engine("e1"))
    reserve(cluster, "r1", prefill="e1", decode="e1")
    assert cluster.engines["e1"].in_flight_count == 1
