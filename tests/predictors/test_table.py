from __future__ import annotations

import math

import pytest

from gateway.core.errors import ConfigError
from gateway.core.types import Engine, Role
from predictors.profile import load_profile
from predictors.table import Grid, Table, decode_grid, prefill_grid

ENGINE = Engine(id="p", url="http://p", role=Role.PREFILL)
GRID = Grid(rows=(100.0, 200.0), columns=(0.0, 1.0), seconds=((1.0, 0.5), (3.0, 0.5)))


@pytest.mark.parametrize(
    ("row", "column", "seconds"),
    [
        (100, 0, 1.0),
        (200, 1, 0.5),
        (150, 0, 2.0),
        (150, 0.5, 1.25),
        (10, 0, 1.0),
        (400, 0, 6.0),
        (200, 9, 0.5),
    ],
)
def test_a_grid_is_bilinear_flat_below_and_proportional_past_its_last_row(
    row: float, column: float, seconds: float
) -> None:
    assert GRID.at(row, column) == pytest.approx(seconds)


def test_a_noisy_grid_is_made_monotone_along_both_axes() -> None:
    noisy = Grid((1.0, 2.0, 3.0), (0.0, 0.5, 1.0), ((5.0, 6.0, 1.0), (4.0, 3.0, 2.0), (9.0, 8.0, 1.0)))
    assert noisy.smoothed(falls_along_columns=True).seconds == ((6.0, 6.0, 1.0), (6.0, 6.0, 2.0), (9.0, 8.0, 2.0))
    assert noisy.smoothed(falls_along_columns=False).seconds == ((5.0, 6.0, 6.0), (5.0, 6.0, 6.0), (9.0, 9.0, 9.0))


@pytest.mark.parametrize(("length", "cached"), [(3000, 0), (3000, 1500), (50_000, 45_000), (120_000, 30_000)])
def test_a_table_of_a_profile_comes_within_15_percent_of_it(length: int, cached: int) -> None:
    profile = load_profile("llama3-70b-8xa800-reference")
    table = Table(prefill=prefill_grid(profile), decode=decode_grid(profile)).start()
    expected_s = profile.whole_prefill_s(length, cached)
    assert table.prefill_s(ENGINE, prompt_tokens=length, cached_tokens=cached) == pytest.approx(expected_s, rel=0.15)
    assert table.decode_step_s(ENGINE, batch=20, kv_tokens=length) == pytest.approx(profile.decode_s(20, length))


@pytest.mark.parametrize(
    ("rows", "columns", "seconds"),
    [
        ((), (0.0,), ()),
        ((2.0, 1.0), (0.0,), ((1.0,), (1.0,))),
        ((1.0,), (-1.0,), ((1.0,),)),
        ((0.0,), (0.0,), ((1.0,),)),
        ((1.0,), (0.0, 1.0), ((1.0,),)),
        ((1.0,), (0.0,), ((0.0,),)),
        ((1.0,), (0.0,), ((math.nan,),)),
    ],
)
def test_a_grid_that_is_none_is_refused(
    rows: tuple[float, ...], columns: tuple[float, ...], seconds: tuple[tuple[float, ...], ...]
) -> None:
    with pytest.raises(ConfigError, match="table"):
        Grid(rows, columns, seconds)


def test_hand_off_coefficients_below_zero_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"table\.hand_off"):
        Table(hand_off=(0.0, -1.0))
