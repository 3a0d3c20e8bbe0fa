from __future__ import annotations

import random

import pytest

from gateway.core.interfaces import HandOffOutcome
from gateway.core.types import Engine, Role
from predictors.hand_off import HAND_OFF_PRIOR, HandOffTimes


def engine(name: str, connector: str = "nixl") -> Engine:
    return Engine(id=name, url=f"http://{name}", role=Role.PREFILL, connector=connector)


P0, P1, D0, D1 = engine("p0"), engine("p1"), engine("d0"), engine("d1")


def observe(times: HandOffTimes, prefill: Engine, decode: Engine, s_per_token: float, count: int = 60) -> None:
    rng = random.Random(1)
    for _ in range(count):
        tokens = rng.randint(100, 20_000)
        elapsed_s = (0.01 + s_per_token * tokens) * rng.lognormvariate(0, 0.1)
        times.observe(HandOffOutcome(prefill, decode, tokens, elapsed_s))


def test_an_unknown_connector_takes_what_the_prior_says() -> None:
    times = HandOffTimes().hand_off_s([P0], [D0], prompt_tokens=1000)
    assert times[0, 0] == HAND_OFF_PRIOR.mean[0] + 1000 * HAND_OFF_PRIOR.mean[1]


def test_each_pair_is_learnt_by_itself() -> None:
    times = HandOffTimes()
    observe(times, P0, D0, 1e-6)
    observe(times, P1, D0, 1e-4)
    fast_s, slow_s = times.hand_off_s([P0, P1], [D0], prompt_tokens=10_000)[:, 0]
    assert fast_s == pytest.approx(0.02, rel=0.15)
    assert slow_s == pytest.approx(1.01, rel=0.15)


def test_a_pair_nobody_used_takes_what_its_connector_took_elsewhere() -> None:
    times = HandOffTimes()
    observe(times, P0, D0, 1e-4)
    assert times.hand_off_s([P1], [D1], prompt_tokens=10_000)[0, 0] == pytest.approx(1.01, rel=0.15)
    other = times.hand_off_s([engine("p2", "mooncake")], [D1], prompt_tokens=10_000)
    assert other[0, 0] == pytest.approx(0.105)


def test_a_new_pair_is_seen_by_a_list_of_engines_asked_for_before() -> None:
    times = HandOffTimes()
    before = times.hand_off_s([P0], [D0], prompt_tokens=10_000)[0, 0]
    observe(times, P0, D0, 1e-3)
    assert times.hand_off_s([P0], [D0], prompt_tokens=10_000)[0, 0] > 10 * before


def test_nothing_moves_when_both_stages_run_on_one_engine() -> None:
    assert HandOffTimes().hand_off_s([P0], [P0, D0], prompt_tokens=10_000)[0].tolist() == [0.0, pytest.approx(0.105)]


def test_at_most_max_pairs_are_kept_and_the_stalest_goes_first() -> None:
    times = HandOffTimes(max_pairs=2)
    observe(times, P0, D0, 1e-3)
    observe(times, P0, D1, 1e-3)
    observe(times, P1, D0, 1e-6, count=1)
    observe(times, P0, D1, 1e-3, count=1)
    observe(times, P1, D1, 1e-6)
    assert len(times) == 2
    assert times.hand_off_s([P0], [D1], prompt_tokens=10_000)[0, 0] == pytest.approx(10, rel=0.15)
    assert times.hand_off_s([P1], [D1], prompt_tokens=10_000)[0, 0] == pytest.approx(0.02, rel=0.15)
