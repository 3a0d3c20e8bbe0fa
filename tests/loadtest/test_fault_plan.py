"""Faults written by hand and drawn from a seed."""

import pytest

from gateway.core.errors import ConfigError
from loadtest.fault_plan import Fault, FaultKind, draw_faults, parse_fault


def test_a_fault_is_written_in_one_word() -> None:
    assert parse_fault("slows:p3@600+120x2.5") == Fault(FaultKind.SLOWS, "p3", 600.0, 120.0, 2.5)
    assert parse_fault("dies:d1@0+5").kind is FaultKind.DIES


@pytest.mark.parametrize(
    "text", ["", "explodes:p1@0+1", "dies:p1", "dies:p1@-1+5", "dies:p1@0+0", "slows:p1@0+1x0", "dies:p1@1.2.3+4"]
)
def test_a_fault_that_makes_no_sense_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError, match="fault"):
        parse_fault(text)


def test_the_same_seed_draws_the_same_faults() -> None:
    first, again, other = (draw_faults(20, ["p1", "d1"], span_s=100.0, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert {fault.engine_id for fault in first} == {"p1", "d1"}
    assert all(0 <= fault.at_s <= 100.0 for fault in first)
