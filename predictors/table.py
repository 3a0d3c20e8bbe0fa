"""Interpolation in measured grids: no formula assumed, only that more work never takes less time.

Prefills stand over prompt length and *share* cached, not tokens cached: then a longer prompt with the same cache moves
the right way along both axes, and a prompt that is nearly all cached reads the column of share 1 at any length.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from gateway.core.errors import ConfigError
from gateway.core.interfaces import DecodeOutcome, HandOffOutcome, PrefillOutcome
from gateway.core.types import Engine, Report
from predictors.profile import WEAK_PRIOR, Profile

Row = tuple[float, ...]


@dataclass(frozen=True)
class Grid:
    """Seconds over a grid of two quantities: `seconds[i][j]` at `rows[i]` and `columns[j]`, both ascending.

    Between the points bilinear; below the first point its value; past the last row in proportion to the row, past the
    last column that column's value.
    """

    rows: Row
    columns: Row
    seconds: tuple[Row, ...]

    def __post_init__(self) -> None:
        for key in ("rows", "columns"):
            axis = getattr(self, key)
            if not axis or axis[0] < 0 or any(low >= high for low, high in pairwise(axis)):
                raise ConfigError(f"table.{key}: must ascend strictly from a number >= 0, not {axis}")
        if self.rows[-1] <= 0:
            raise ConfigError("table.rows: the last row must be > 0")
        if len(self.seconds) != len(self.rows) or any(len(line) != len(self.columns) for line in self.seconds):
            raise ConfigError(f"table.seconds: must have shape ({len(self.rows)}, {len(self.columns)})")
        if not all(math.isfinite(value) and value > 0 for line in self.seconds for value in line):
            raise ConfigError("table.seconds: must be finite numbers > 0")

    def smoothed(self, *, falls_along_columns: bool) -> Grid:
        """The grid made monotone: never falling along rows; along columns never rising, or never falling."""
        values = np.maximum.accumulate(np.array(self.seconds), axis=0)
        if falls_along_columns:
            values = np.maximum.accumulate(values[:, ::-1], axis=1)[:, ::-1]
        else:
            values = np.maximum.accumulate(values, axis=1)
        return Grid(self.rows, self.columns, tuple(tuple(float(value) for value in line) for line in values))

    def at(self, row: float, column: float) -> float:
        """Seconds at that point, > 0."""
        upper, row_part = _place(self.rows, row)
        right, column_part = _place(self.columns, column)
        above, below = self.seconds[max(0, upper - 1)], self.seconds[upper]
        left = max(0, right - 1)
        first = above[left] + (above[right] - above[left]) * column_part
        second = below[left] + (below[right] - below[left]) * column_part
        return (first + (second - first) * row_part) * max(1.0, row / self.rows[-1])


def _place(axis: Row, value: float) -> tuple[int, float]:
    """The index of the point at or after `value`, and how far `value` is from the point before it, 0 <= part <= 1."""
    if value >= axis[-1]:
        return len(axis) - 1, 1.0
    upper = bisect_right(axis, value)
    if upper == 0:
        return 0, 0.0
    return upper, (value - axis[upper - 1]) / (axis[upper] - axis[upper - 1])


_LENGTHS: Row = (1, 256, 1024, 4096, 16_384, 65_536, 131_072)
_CACHED_RATIOS: Row = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
_BATCHES: Row = (1, 8, 32, 128, 512)
_KV_TOKENS: Row = (0, 65_536, 262_144, 1_048_576, 4_194_304)


def prefill_grid(profile: Profile) -> Grid:
    """What the profile says at the grid's points: prompt tokens down, cached ratio across."""
    lines = tuple(
        tuple(profile.whole_prefill_s(int(length), int(length * ratio)) for ratio in _CACHED_RATIOS)
        for length in _LENGTHS
    )
    return Grid(_LENGTHS, _CACHED_RATIOS, lines)


def decode_grid(profile: Profile) -> Grid:
    """What the profile says at the grid's points: batch down, KV tokens across."""
    lines = tuple(tuple(profile.decode_s(int(batch), int(tokens)) for tokens in _KV_TOKENS) for batch in _BATCHES)
    return Grid(_BATCHES, _KV_TOKENS, lines)


class TableEstimator:
    """A started `Table`: its grids made monotone."""

    def __init__(self, settings: Table) -> None:
        self._prefill = settings.prefill.smoothed(falls_along_columns=True)
        self._decode = settings.decode.smoothed(falls_along_columns=False)
        self._hand_off = settings.hand_off

    def prefill_s(self, engine: Engine, *, prompt_tokens: int, cached_tokens: int) -> float:
        """Seconds of the whole prefill on an idle engine, > 0."""
        length = max(1, prompt_tokens)
        return self._prefill.at(length, max(0, cached_tokens) / length)

    def decode_step_s(self, engine: Engine, *, batch: int, kv_tokens: int) -> float:
        """Seconds of one decode step, > 0."""
        return self._decode.at(max(1, batch), max(0, kv_tokens))

    def hand_off_s(
        self, prefills: Sequence[Engine], decodes: Sequence[Engine], *, prompt_tokens: int
    ) -> NDArray[np.float64]:
        """Seconds to move the prompt's KV, the same for each pair, shape (prefills, decodes)."""
        return np.full((len(prefills), len(decodes)), self._hand_off[0] + self._hand_off[1] * max(0, prompt_tokens))

    def observe_prefill(self, outcome: PrefillOutcome) -> None:
        """Ignored: a table does not learn."""

    def observe_decode(self, outcome: DecodeOutcome) -> None:
        """Ignored: a table does not learn."""

    def observe_hand_off(self, outcome: HandOffOutcome) -> None:
        """Ignored: a table does not learn."""

    def observe_report(self, engine: Engine, report: Report) -> None:
        """Ignored: a table does not learn."""


@dataclass(frozen=True)
class Table:
    """Predicts by interpolation, the same for all engines. Grids are made monotone when started."""

    prefill: Grid = field(default_factory=lambda: prefill_grid(WEAK_PRIOR))
    """Prompt tokens down, cached ratio (0 to 1) across."""
    decode: Grid = field(default_factory=lambda: decode_grid(WEAK_PRIOR))
    """Batch down, KV tokens across."""
    hand_off: tuple[float, float] = (0.005, 1e-5)
    """Seconds per hand-off, per token."""

    def __post_init__(self) -> None:
        if not all(math.isfinite(value) and value >= 0 for value in self.hand_off):
            raise ConfigError(f"table.hand_off: must be finite numbers >= 0, not {self.hand_off}")

    def start(self) -> TableEstimator:
        """The working table."""
        return TableEstimator(self)
