"""Characters per token: learnt, bounded and not to be thrown off by one odd answer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.token_estimate import HIGHEST_RATIO, LOWEST_RATIO, TokenRatios


def test_a_model_not_heard_of_has_the_first_guess() -> None:
    assert TokenRatios().count("m", 4000) == 1000
    assert TokenRatios(2.0).count("m", 4000) == 2000
    assert TokenRatios().count("m", 0) == 1


def test_the_ratio_becomes_what_engines_report_for_that_model_only() -> None:
    ratios = TokenRatios()
    for _ in range(100):
        ratios.learn("m", chars=3000, prompt_tokens=1000)
    assert ratios.ratio("m") == pytest.approx(3.0, abs=0.1)
    assert ratios.ratio("n") == 4.0


def test_one_odd_answer_does_not_throw_the_ratio_off() -> None:
    ratios = TokenRatios()
    for _ in range(100):
        ratios.learn("m", chars=4000, prompt_tokens=1000)
    ratios.learn("m", chars=10, prompt_tokens=1_000_000)
    ratios.learn("m", chars=10_000_000, prompt_tokens=1)
    assert 1.5 < ratios.ratio("m") < 4.5


@given(st.lists(st.tuples(st.integers(-5, 10**12), st.integers(-5, 10**12)), max_size=50))
def test_no_answer_takes_the_ratio_out_of_its_bounds(answers: list[tuple[int, int]]) -> None:
    ratios = TokenRatios()
    for chars, tokens in answers:
        ratios.learn("m", chars=chars, prompt_tokens=tokens)
    assert LOWEST_RATIO * 0.99 <= ratios.ratio("m") <= HIGHEST_RATIO * 1.01


def test_the_model_not_heard_of_for_longest_is_forgotten() -> None:
    ratios = TokenRatios()
    for number in range(300):
        ratios.learn(str(number), chars=3000, prompt_tokens=1000)
    assert ratios.ratio("0") == 4.0
    assert ratios.ratio("299") < 4.0
