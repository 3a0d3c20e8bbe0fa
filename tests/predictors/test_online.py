"""A synthetic engine with queues, noise and outliers, and what is known of it after so many outcomes."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import pytest

from gateway.core.errors import ConfigError
from gateway.core.interfaces import DecodeOutcome, Estimator, HandOffOutcome, PrefillOutcome
from gateway.core.types import Engine, Role
from predictors.analytic import Analytic
from predictors.online import Online
from predictors.profile import Profile, load_profile

PREFILL = Engine(id="p0", url="http://p0", role=Role.PREFILL)
DECODE = Engine(id="d0", url="http://d0", role=Role.DECODE)
A800 = load_profile("llama3-70b-8xa800-reference")
H100 = load_profile("llama3-8b-1xh100")


@dataclass
class World:
    """Draws requests, asks for predictions and tells what really happened: 10 % noise, 3 % outliers."""

    estimator: Estimator
    truth: Profile
    rng: random.Random
    slowdown: float = 1.0
    errors: list[float] = field(default_factory=list)

    def prompt(self) -> tuple[int, int]:
        length = int(min(120_000, max(50, self.rng.lognormvariate(8.8, 1.2))))
        return length, int(length * self.rng.random() * 0.9) if self.rng.random() < 0.5 else 0

    def times(self, prompt: tuple[int, int], engine: Engine) -> tuple[float, float]:
        predicted_s = self.estimator.prefill_s(engine, prompt_tokens=prompt[0], cached_tokens=prompt[1])
        return predicted_s, self.slowdown * self.truth.whole_prefill_s(*prompt)

    def prefills(self, count: int, engine: Engine = PREFILL) -> float:
        """Lets `count` prefills end, each behind up to three others; the median error of what was predicted."""
        errors = []
        for _ in range(count):
            prompt = self.prompt()
            predicted_s, own_s = self.times(prompt, engine)
            ahead = [self.times(self.prompt(), engine) for _ in range(self.rng.randrange(4))]
            ahead_s = sum(pair[0] for pair in ahead)
            elapsed_s = (own_s + sum(pair[1] for pair in ahead)) * self.rng.lognormvariate(0, 0.1)
            if self.rng.random() < 0.03:
                elapsed_s *= self.rng.choice([0.1, 10.0, 30.0])
            errors.append(abs(predicted_s - own_s) / own_s)
            self.estimator.observe_prefill(
                PrefillOutcome(engine, *prompt, ahead_s, elapsed_s, predicted_s=ahead_s + predicted_s)
            )
        return float(np.median(errors))

    def decodes(self, count: int) -> float:
        """Lets `count` decodes end; the median error of the predicted steps."""
        errors = []
        for _ in range(count):
            batch = self.rng.randint(1, 64)
            kv_tokens = batch * self.rng.randint(500, 15_000)
            actual_s = self.slowdown * self.truth.decode_s(batch, kv_tokens)
            predicted_s = self.estimator.decode_step_s(DECODE, batch=batch, kv_tokens=kv_tokens)
            errors.append(abs(predicted_s - actual_s) / actual_s)
            measured_s = actual_s * self.rng.lognormvariate(0, 0.1)
            self.estimator.observe_decode(DecodeOutcome(DECODE, batch, kv_tokens, 100, measured_s, predicted_s))
        return float(np.median(errors))


def world(truth: Profile, seed: int, base: Profile | None = None) -> World:
    settings = Online(base=None if base is None else Analytic(base))
    return World(settings.start(), truth, random.Random(seed))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("truth", [A800, H100], ids=lambda profile: profile.name)
def test_from_nothing_200_prefills_bring_the_median_error_under_8_percent(truth: Profile, seed: int) -> None:
    cold = world(truth, seed)
    cold.prefills(200)
    assert cold.prefills(100) < 0.08


@pytest.mark.parametrize("seed", range(3))
def test_from_nothing_200_decodes_bring_the_median_error_under_5_percent(seed: int) -> None:
    cold = world(A800, seed)
    cold.decodes(200)
    assert cold.decodes(100) < 0.05


@pytest.mark.parametrize("base", [None, A800], ids=["cold", "corrector"])
@pytest.mark.parametrize("seed", range(3))
def test_an_engine_that_slows_to_half_speed_is_followed_within_50_prefills(seed: int, base: Profile | None) -> None:
    slowing = world(A800, seed, base)
    slowing.prefills(200)
    slowing.slowdown = 2.0
    slowing.prefills(50)
    assert slowing.prefills(50) < 0.1


def test_a_decode_engine_that_slows_to_half_speed_is_followed_within_50_decodes() -> None:
    slowing = world(A800, 1)
    slowing.decodes(200)
    slowing.slowdown = 2.0
    slowing.decodes(50)
    assert slowing.decodes(50) < 0.1


def test_the_corrector_starts_at_its_base() -> None:
    estimator = Online(base=Analytic(A800)).start()
    assert estimator.prefill_s(PREFILL, prompt_tokens=9000, cached_tokens=100) == A800.whole_prefill_s(9000, 100)
    assert estimator.decode_step_s(DECODE, batch=9, kv_tokens=9000) == A800.decode_s(9, 9000)
    hand_off_s = estimator.hand_off_s([PREFILL], [DECODE], prompt_tokens=9000)
    assert hand_off_s == pytest.approx(A800.hand_off_s(9000))


def test_the_corrector_learns_that_its_profile_is_of_other_hardware() -> None:
    corrected = world(H100, 1, A800)
    corrected.prefills(200)
    assert corrected.prefills(100) < 0.1


@pytest.mark.parametrize("scale", [0.04, 1.0, 25.0])
@pytest.mark.parametrize("base", [None, A800], ids=["cold", "corrector"])
def test_behind_long_queues_the_time_between_ends_is_enough(base: Profile | None, scale: float) -> None:
    rng, estimator = random.Random(1), Online(base=None if base is None else Analytic(base)).start()
    for _ in range(300):
        length = rng.randint(500, 50_000)
        busy_s = scale * H100.whole_prefill_s(length, 0) * rng.lognormvariate(0, 0.1)
        estimator.observe_prefill(PrefillOutcome(PREFILL, length, 0, 100.0, 500.0, 101.0, busy_s))
    for length in (1000, 10_000, 50_000):
        expected_s = scale * H100.whole_prefill_s(length, 0)
        assert estimator.prefill_s(PREFILL, prompt_tokens=length, cached_tokens=0) == pytest.approx(
            expected_s, rel=0.25
        )


def test_prefills_computed_in_one_step_are_learnt_as_one_sum() -> None:
    estimator = Online().start()
    for _ in range(100):
        for busy_s in (0.4, 0.0, 1e-5, 0.0):
            estimator.observe_prefill(PrefillOutcome(PREFILL, 1000, 0, 0.0, 0.4, 0.1, busy_s))
    assert estimator.prefill_s(PREFILL, prompt_tokens=1000, cached_tokens=0) == pytest.approx(0.1, rel=0.05)


def test_an_engine_nobody_has_used_yet_is_predicted_like_its_sibling() -> None:
    known = world(A800, 1)
    known.prefills(200)
    sibling = Engine(id="p1", url="http://p1", role=Role.PREFILL)
    stranger = Engine(id="x", url="http://x", role=Role.PREFILL, pool="other")
    expected_s = known.estimator.prefill_s(PREFILL, prompt_tokens=9000, cached_tokens=0)
    assert known.estimator.prefill_s(sibling, prompt_tokens=9000, cached_tokens=0) == expected_s
    assert known.estimator.prefill_s(stranger, prompt_tokens=9000, cached_tokens=0) != expected_s


def test_one_slow_engine_does_not_change_what_is_known_of_another() -> None:
    fleet = world(A800, 1)
    fleet.prefills(100)
    before_s = fleet.estimator.prefill_s(PREFILL, prompt_tokens=9000, cached_tokens=0)
    fleet.slowdown = 3.0
    fleet.prefills(100, Engine(id="p1", url="http://p1", role=Role.PREFILL))
    assert fleet.estimator.prefill_s(PREFILL, prompt_tokens=9000, cached_tokens=0) == before_s


def test_the_engines_remembered_are_bounded() -> None:
    estimator = Online(max_engines=3).start()
    for number in range(50):
        engine = Engine(id=f"p{number}", url="http://p", role=Role.PREFILL, pool=f"pool{number}")
        estimator.observe_prefill(PrefillOutcome(engine, 1000, 0, 0.0, 9.0, 0.1))
    forgotten = Engine(id="p0", url="http://p", role=Role.PREFILL, pool="pool0")
    fresh_s = Online().start().prefill_s(forgotten, prompt_tokens=1000, cached_tokens=0)
    assert estimator.prefill_s(forgotten, prompt_tokens=1000, cached_tokens=0) == fresh_s


def test_observed_hand_offs_replace_the_base_s() -> None:
    estimator = Online(base=Analytic(A800)).start()
    for _ in range(50):
        estimator.observe_hand_off(HandOffOutcome(PREFILL, DECODE, 10_000, 1.0))
    assert estimator.hand_off_s([PREFILL], [DECODE], prompt_tokens=10_000)[0, 0] == pytest.approx(1.0, rel=0.05)


def test_a_window_too_short_to_learn_in_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"online\.window_outcomes"):
        Online(window_outcomes=2)
