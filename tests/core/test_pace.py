"""How often something happens."""

import pytest

from gateway.core.pace import Pace


def test_one_tick_tells_no_interval() -> None:
    pace = Pace()
    pace.tick(1.0)
    assert pace.interval_s is None


def test_the_mean_interval_follows_a_change() -> None:
    pace = Pace()
    for step in range(50):
        pace.tick(step * 1.0)
    assert pace.interval_s == pytest.approx(1.0)
    for step in range(200):
        pace.tick(50 + step * 0.1)
    assert pace.interval_s == pytest.approx(0.1, rel=0.05)
