"""Cutting, speeding up, mixing and describing workloads."""

from __future__ import annotations

from itertools import count

import pytest

from loadtest.workload import TraceRequest, WorkloadError, block_count, describe, mixed, scaled, sliced


def at(*arrivals_s: float, ids: tuple[int, ...] | None = (0,), session: str | None = None) -> list[TraceRequest]:
    return [TraceRequest(arrival_s, 100, 10, ids, session) for arrival_s in arrivals_s]


def arrivals(requests: object) -> list[float]:
    return [request.arrival_s for request in requests]  # type: ignore[attr-defined]


def test_a_prompt_has_one_id_for_each_started_block() -> None:
    assert [block_count(tokens) for tokens in (1, 512, 513)] == [1, 1, 2]


def test_twice_the_speed_halves_the_arrivals_and_nothing_else() -> None:
    assert list(scaled(at(0, 4, 6), speed=2)) == at(0, 2, 3)


@pytest.mark.parametrize("speed", [0, -1, float("nan"), float("inf")])
def test_an_impossible_speed_is_refused_at_once(speed: float) -> None:
    with pytest.raises(WorkloadError, match="speed"):
        scaled([], speed=speed)


def test_a_slice_counts_from_its_own_start_and_leaves_its_end_out() -> None:
    assert arrivals(sliced(at(0, 1, 2, 3, 4), start_s=1, seconds=3)) == [0, 1, 2]
    assert arrivals(sliced(at(0, 1, 2), count=2)) == [0, 1]
    assert arrivals(sliced(at(0, 1, 2))) == [0, 1, 2]


def test_a_slice_ends_an_endless_workload() -> None:
    endless = (request for second in count() for request in at(second))
    assert arrivals(sliced(endless, seconds=2)) == [0, 1]


@pytest.mark.parametrize("bounds", [{"seconds": -1.0}, {"count": -1}, {"start_s": float("nan")}])
def test_a_negative_bound_is_refused_at_once(bounds: dict[str, float]) -> None:
    with pytest.raises(WorkloadError, match=next(iter(bounds))):
        sliced([], **bounds)  # type: ignore[arg-type]


def test_a_mix_is_in_order_and_shares_nothing_between_its_parts() -> None:
    mix = list(mixed(at(0, 2, ids=(0, 1), session="a"), at(1, 3, ids=(0, 1), session="a")))
    assert arrivals(mix) == [0, 1, 2, 3]
    assert mix[0].block_ids == mix[2].block_ids
    assert not set(mix[0].block_ids or ()) & set(mix[1].block_ids or ())
    assert [request.session for request in mix] == ["0/a", "1/a", "0/a", "1/a"]


def test_a_mix_keeps_unknown_block_ids_unknown() -> None:
    assert next(mixed(at(0, ids=None), [])).block_ids is None


def test_a_description_counts_rate_lengths_and_blocks_seen_before() -> None:
    traits = describe([*at(0, ids=(0, 1)), *at(1, ids=(0, 2)), *at(4, ids=(0, 1))], window_s=2)
    assert (traits.requests, traits.rate_per_s) == (3, 0.75)
    assert (traits.prompt.mean, traits.output.p90) == (100, 10)
    assert traits.hit_ratio == pytest.approx(3 / 6)


def test_even_arrivals_have_no_dispersion_and_bursts_have_much() -> None:
    assert describe(at(*range(100)), window_s=10).dispersion == 0
    bursts = sorted(float(burst * 20) for burst in range(6) for _ in range(20))
    assert describe(at(*bursts), window_s=10).dispersion == pytest.approx(10)


@pytest.mark.parametrize("requests", [[], at(0), at(0, 0, 30)])
def test_what_is_too_short_to_describe_is_refused(requests: list[TraceRequest]) -> None:
    with pytest.raises(WorkloadError, match="too short"):
        describe(requests)
