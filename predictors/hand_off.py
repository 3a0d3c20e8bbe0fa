"""What moving a prompt's KV takes, learnt from observed transfers: a start-up time and a rate per pair of engines.

A pair nobody has used yet takes what its connector took elsewhere. The coefficients in force live in two arrays, so
that a decision over many pairs is one index and one multiply-add.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from gateway.core.interfaces import HandOffOutcome
from gateway.core.types import Engine
from predictors.learner import Learner, Prior

HAND_OFF_PRIOR = Prior(mean=(0.005, 1e-5), spread=(0.1, 1e-4))
"""5 ms and 10 us per token: 128 KiB of KV per token over about 100 Gbit/s."""
MAX_CONNECTORS = 64

MAX_LOOKUPS = 256
"""Distinct lists of candidate engines whose row numbers are remembered."""
Key = TypeVar("Key", bound=Hashable)

PRIOR_ROW, SAME_ENGINE_ROW = 0, 1


class HandOffTimes:
    """Seconds per (prefill, decode) pair; at most `max_pairs` are kept, the least recently observed goes first."""

    def __init__(self, *, max_pairs: int = 4096, window_outcomes: int = 200, prior: Prior = HAND_OFF_PRIOR) -> None:
        self._pairs: dict[tuple[str, str], tuple[int, Learner]] = {}
        self._connectors: dict[str, tuple[int, Learner]] = {}
        self._max_pairs = max_pairs
        self._fresh = Learner(prior, window_outcomes=window_outcomes)
        rows = 2 + max_pairs + MAX_CONNECTORS
        self._base_s, self._s_per_token = np.zeros(rows), np.zeros(rows)
        self._base_s[PRIOR_ROW], self._s_per_token[PRIOR_ROW] = prior.mean
        self._lookups: dict[tuple[tuple[str, ...], tuple[str, ...]], NDArray[np.intp]] = {}

    def __len__(self) -> int:
        return len(self._pairs)

    def observe(self, outcome: HandOffOutcome) -> None:
        """Learns from one transfer."""
        connector, pair = outcome.prefill.connector, (outcome.prefill.id, outcome.decode.id)
        first_row = 2 + self._max_pairs
        shared = self._slot(self._connectors, connector, range(first_row, first_row + MAX_CONNECTORS), self._fresh)
        own = self._slot(self._pairs, pair, range(2, first_row), shared[1])
        for row, learner in (shared, own):
            learner.observe((1.0, float(max(0, outcome.prompt_tokens))), outcome.elapsed_s)
            self._base_s[row], self._s_per_token[row] = learner.coefficients()

    def hand_off_s(
        self, prefills: Sequence[Engine], decodes: Sequence[Engine], *, prompt_tokens: int
    ) -> NDArray[np.float64]:
        """Seconds of each pair, shape (prefills, decodes), >= 0; 0 where both are the same engine."""
        rows = self._rows(prefills, decodes)
        return self._base_s[rows] + self._s_per_token[rows] * max(0, prompt_tokens)

    def _slot(
        self, slots: dict[Key, tuple[int, Learner]], key: Key, rows: range, parent: Learner
    ) -> tuple[int, Learner]:
        """The row and learner of a key, the most recently used from now on; a new key starts as its parent's heir."""
        slot = slots.pop(key, None)
        if slot is None:
            self._lookups.clear()
            row = rows[len(slots)] if len(slots) < len(rows) else slots.pop(next(iter(slots)))[0]
            slot = (row, parent.heir())
        slots[key] = slot
        return slot

    def _rows(self, prefills: Sequence[Engine], decodes: Sequence[Engine]) -> NDArray[np.intp]:
        key = (tuple(engine.id for engine in prefills), tuple(engine.id for engine in decodes))
        rows = self._lookups.get(key)
        if rows is None:
            found = [[self._row(prefill, decode) for decode in decodes] for prefill in prefills]
            rows = np.array(found, dtype=np.intp).reshape(len(prefills), len(decodes))
            if len(self._lookups) >= MAX_LOOKUPS:
                self._lookups.clear()
            self._lookups[key] = rows
        return rows

    def _row(self, prefill: Engine, decode: Engine) -> int:
        if prefill.id == decode.id:
            return SAME_ENGINE_ROW
        slot = self._pairs.get((prefill.id, decode.id)) or self._connectors.get(prefill.connector)
        return PRIOR_ROW if slot is None else slot[0]
