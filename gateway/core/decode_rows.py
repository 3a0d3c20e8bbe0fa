"""The requests that decode or will, as columns: what their engines hold now, and what they will hold in a while.

One row for each reservation, dense, so that a look ahead is a few numpy operations whatever the number of engines.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gateway.core.interfaces import LengthLaw

FIRST_ROWS = 64


class Row(Protocol):
    """Whoever owns a row; told when it moves."""

    row: int


class DecodeRows:
    """Columns of equal length; the first `len` entries count."""

    def __init__(self) -> None:
        self._owners: list[Row] = []
        self._groups: dict[tuple[str, ...], int] = {}
        self.engine = np.zeros(FIRST_ROWS, dtype=np.intp)
        """The decode engine's number."""
        self.group = np.zeros(FIRST_ROWS, dtype=np.intp)
        self.prompt_tokens = np.zeros(FIRST_ROWS)
        self.done_tokens = np.zeros(FIRST_ROWS)
        """Output tokens when last told."""
        self.told_at = np.zeros(FIRST_ROWS)
        """When that was; +inf before the first token."""
        self.begins_at = np.zeros(FIRST_ROWS)
        """When its prefill ended or is predicted to."""
        self.bound_s = np.zeros(FIRST_ROWS)
        """Its TBT bound; +inf for none."""
        self.peak_batch = np.zeros(FIRST_ROWS)
        self.peak_tokens = np.zeros(FIRST_ROWS)
        """The fullest batch that it met, by KV tokens."""
        self.stall_s = np.zeros(FIRST_ROWS)
        self.longest_stall_s = np.zeros(FIRST_ROWS)
        """What prefills on its engine were predicted to add to its steps, together and to one of them at most."""
        self.is_here = np.zeros(FIRST_ROWS, dtype=bool)
        """Whether its decode was sent to the engine."""

    def __len__(self) -> int:
        return len(self._owners)

    def add(
        self, owner: Row, engine: int, group: tuple[str, ...], *, prompt_tokens: int, begins_at: float, bound_s: float
    ) -> None:
        """Appends a request whose prefill is still to end."""
        row = len(self._owners)
        if row == len(self.engine):
            self._grow()
        self._owners.append(owner)
        owner.row = row
        self.engine[row], self.group[row] = engine, self._groups.setdefault(group, len(self._groups))
        self.prompt_tokens[row], self.begins_at[row], self.bound_s[row] = prompt_tokens, begins_at, bound_s
        self.done_tokens[row], self.told_at[row], self.is_here[row] = 0.0, np.inf, False
        self.peak_batch[row] = self.peak_tokens[row] = 0.0
        self.stall_s[row] = self.longest_stall_s[row] = 0.0

    def remove(self, owner: Row) -> None:
        """Takes a row out; the last one moves into its place."""
        row, last = owner.row, self._owners.pop()
        if last is not owner:
            for column in self._columns():
                column[row] = column[len(self._owners)]
            self._owners[row] = last
            last.row = row
        owner.row = -1

    def begin(self, row: int, engine: int, now: float) -> None:
        """The row's decode is sent to that engine: all that are there meet a batch fuller by one."""
        self.engine[row], self.begins_at[row], self.is_here[row] = engine, now, True
        count = len(self)
        here = np.flatnonzero(self.is_here[:count] & (self.engine[:count] == engine))
        tokens = float(self.prompt_tokens[here].sum() + self.done_tokens[here].sum())
        fuller = here[self.peak_tokens[here] < tokens]
        self.peak_tokens[fuller], self.peak_batch[fuller] = tokens, len(here)

    def stall(self, engine: int, prefill_s: float, step_s: float) -> None:
        """A prefill of that many seconds is mixed into the steps of all that are there, one by `step_s` at most."""
        count = len(self)
        here = np.flatnonzero(self.is_here[:count] & (self.engine[:count] == engine))
        self.stall_s[here] += prefill_s
        self.longest_stall_s[here] = np.maximum(self.longest_stall_s[here], step_s)

    def tell(self, row: int, output_tokens: int, now: float) -> None:
        """The request has that many output tokens now."""
        self.done_tokens[row], self.told_at[row] = output_tokens, now

    def present(self, engine_count: int, *, but: int = -1) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Requests and KV tokens whose decode was sent to each engine, two arrays of shape (engines,)."""
        count = len(self)
        here = self.is_here[:count].copy()
        if but >= 0:
            here[but] = False
        engine = self.engine[:count][here]
        tokens = (self.prompt_tokens[:count] + self.done_tokens[:count])[here]
        return (
            np.bincount(engine, minlength=engine_count).astype(float),
            np.bincount(engine, weights=tokens, minlength=engine_count).astype(float),
        )

    def tightest_s(self, engine_count: int) -> NDArray[np.float64]:
        """The lowest TBT bound among each engine's requests, +inf without one, shape (engines,)."""
        bounds = np.full(engine_count, np.inf)
        np.minimum.at(bounds, self.engine[: len(self)], self.bound_s[: len(self)])
        return bounds

    def ahead(
        self,
        horizons_s: NDArray[np.float64],
        step_s: NDArray[np.float64],
        law: LengthLaw | None,
        *,
        now: float,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Expected requests and KV tokens of each engine after each horizon, two arrays of shape (engines, horizons).

        Who arrives by then counts, and who will probably have ended counts by the chance that he has not. `step_s` has
        shape (engines,): how fast their batches advance. Without a law of lengths nobody ends.
        """
        count, engines = len(self), len(step_s)
        engine, pace_s = self.engine[:count], step_s[self.engine[:count]]
        told_at, begins_at = self.told_at[:count], self.begins_at[:count]
        since_s = np.where(np.isinf(told_at), 0.0, now - told_at)
        done = self.done_tokens[:count] + since_s / pace_s
        starts_s = np.maximum(0.0, begins_at - now)
        ahead = np.maximum(0.0, horizons_s[None, :] - starts_s[:, None]) / pace_s[:, None]
        weight = np.where(starts_s[:, None] <= horizons_s[None, :], self._survival(done, ahead, law), 0.0)
        tokens = weight * (self.prompt_tokens[:count] + done)[:, None] + weight * ahead
        batch_at, tokens_at = np.zeros((engines, len(horizons_s))), np.zeros((engines, len(horizons_s)))
        np.add.at(batch_at, engine, weight)
        np.add.at(tokens_at, engine, tokens)
        return batch_at, tokens_at

    def _survival(
        self, done: NDArray[np.float64], ahead: NDArray[np.float64], law: LengthLaw | None
    ) -> NDArray[np.float64]:
        if law is None:
            return np.ones(ahead.shape)
        groups = self.group[: len(self)]
        if len(self._groups) == 1:
            return law.survival(next(iter(self._groups)), done, ahead)
        survival = np.ones(ahead.shape)
        for words, number in self._groups.items():
            rows = np.flatnonzero(groups == number)
            if len(rows):
                survival[rows] = law.survival(words, done[rows], ahead[rows])
        return survival

    def _columns(self) -> tuple[NDArray[np.generic], ...]:
        return (
            self.engine,
            self.group,
            self.prompt_tokens,
            self.done_tokens,
            self.told_at,
            self.begins_at,
            self.bound_s,
            self.peak_batch,
            self.peak_tokens,
            self.stall_s,
            self.longest_stall_s,
            self.is_here,
        )

    def _grow(self) -> None:
        for name in (
            "engine",
            "group",
            "prompt_tokens",
            "done_tokens",
            "told_at",
            "begins_at",
            "bound_s",
            "peak_batch",
            "peak_tokens",
            "stall_s",
            "longest_stall_s",
            "is_here",
        ):
            column = getattr(self, name)
            setattr(self, name, np.concatenate([column, np.zeros_like(column)]))
