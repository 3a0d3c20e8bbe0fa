"""Predicted against reported: a verdict only on enough comparisons."""

from gateway.core.agreement import MIN_CHECKS, WINDOW, Agreement


def checked(*pairs: tuple[int, int]) -> Agreement:
    agreement = Agreement()
    for predicted, reported in pairs:
        agreement.check(predicted_tokens=predicted, reported_tokens=reported, block_tokens=16)
    return agreement


def test_a_few_wrong_ones_are_no_verdict() -> None:
    assert not checked(*[(0, 160)] * (MIN_CHECKS - 1)).is_wrong
    assert checked(*[(0, 160)] * MIN_CHECKS).is_wrong


def test_one_block_more_or_less_is_right_but_not_exact() -> None:
    agreement = checked((160, 160), (160, 144), (160, 176))
    assert (agreement.ratio, agreement.agreed_count, agreement.checked_count) == (1.0, 1, 3)


def test_only_the_recent_ones_count() -> None:
    agreement = checked(*[(0, 160)] * 500, *[(160, 160)] * WINDOW)
    assert agreement.ratio == 1.0
    assert not agreement.is_wrong


def test_what_was_forgotten_says_nothing() -> None:
    agreement = checked(*[(0, 160)] * MIN_CHECKS)
    agreement.forget()
    assert agreement.ratio is None
    assert not agreement.is_wrong
