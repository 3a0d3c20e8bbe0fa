"""What each decode engine holds now and will hold when a prefill ends: its step, its bound, its memory.

A decode step is taken as a line in batch and KV tokens around the present load: three predictor calls per engine, kept
until something was learnt or the load moved, and then arrays.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gateway.core.cluster import Cluster
from gateway.core.interfaces import EngineLoad, Estimator, LengthLaw
from gateway.core.types import Engine

Floats = NDArray[np.float64]
PROBE_BATCH = 8
PROBE_TOKENS = 16_384
MAX_HORIZONS = 16
"""Instants looked at for one request; with more engines they are rounded up to this many."""


class StepLines:
    """The step of each decode engine as `base + per_request * batch + per_token * KV tokens`."""

    def __init__(self, estimator: Estimator) -> None:
        self._estimator = estimator
        self._lines: dict[str, tuple[int, int, tuple[float, float, float]]] = {}

    def forget(self) -> None:
        """Something was learnt."""
        self._lines.clear()

    def lost(self, engine_id: str) -> None:
        """The engine is gone."""
        self._lines.pop(engine_id, None)

    def line(self, engine: Engine, batch: int, kv_tokens: int) -> tuple[float, float, float]:
        """Base, seconds per request and per KV token near that load."""
        places = batch // PROBE_BATCH, kv_tokens // (4 * PROBE_TOKENS)
        known = self._lines.get(engine.id)
        if known is not None and known[:2] == places:
            return known[2]
        at_batch, at_tokens = max(1, places[0] * PROBE_BATCH), places[1] * 4 * PROBE_TOKENS
        step = self._estimator.decode_step_s
        here_s = step(engine, batch=at_batch, kv_tokens=at_tokens)
        per_request = (step(engine, batch=at_batch + PROBE_BATCH, kv_tokens=at_tokens) - here_s) / PROBE_BATCH
        per_token = (step(engine, batch=at_batch, kv_tokens=at_tokens + PROBE_TOKENS) - here_s) / PROBE_TOKENS
        per_request, per_token = max(0.0, per_request), max(0.0, per_token)
        line = here_s - per_request * at_batch - per_token * at_tokens, per_request, per_token
        self._lines[engine.id] = (*places, line)
        return line


class Forecast:
    """The decode engines of one decision, in the order given; axis 0 of every array below."""

    def __init__(
        self, cluster: Cluster, decodes: Sequence[EngineLoad], lines: StepLines, law: LengthLaw | None, *, now: float
    ) -> None:
        self._rows = cluster.rows
        self._law = law
        self._now = now
        self._count = cluster.number_count
        self.numbers = np.array([cluster.engines[load.engine.id].number for load in decodes], dtype=np.intp)
        self.batch, self.kv_tokens = (column[self.numbers] for column in self._rows.present(self._count))
        found = [
            lines.line(load.engine, int(batch), int(tokens))
            for load, batch, tokens in zip(decodes, self.batch, self.kv_tokens, strict=True)
        ]
        self.base_s, self.per_request_s, self.per_token_s = np.array(found).reshape(-1, 3).T
        capacities = [load.engine.kv_capacity_tokens or np.inf for load in decodes]
        self.capacity_tokens = np.array(capacities, dtype=float)

    @property
    def tightest_s(self) -> Floats:
        """The lowest TBT bound of those that decode there or will, +inf without one, shape (decodes,)."""
        return self._rows.tightest_s(self._count)[self.numbers]

    def step_s(self, batch: Floats, kv_tokens: Floats) -> Floats:
        """Seconds of a step with that load, > 0; axis 0 is the engine."""
        shape = (-1,) + (1,) * (batch.ndim - 1)
        base, per_request, per_token = (
            column.reshape(shape) for column in (self.base_s, self.per_request_s, self.per_token_s)
        )
        return np.maximum(1e-6, base + per_request * batch + per_token * kv_tokens)

    def present(self, *, but: int) -> tuple[Floats, Floats]:
        """Requests and KV tokens there now, without that row, two arrays of shape (decodes,)."""
        batch, tokens = self._rows.present(self._count, but=but)
        return batch[self.numbers], tokens[self.numbers]

    def ahead(self, horizons_s: Floats) -> tuple[Floats, Floats]:
        """Expected requests and KV tokens after each of these times, two arrays of shape (decodes, horizons)."""
        wanted, place = horizons_s, np.arange(len(horizons_s))
        if len(horizons_s) > 1:
            wanted, place = np.unique(horizons_s, return_inverse=True)
            if len(wanted) > MAX_HORIZONS:
                wanted = wanted[0] + (wanted[-1] - wanted[0]) * np.arange(1, MAX_HORIZONS + 1) / MAX_HORIZONS
                place = np.minimum(np.searchsorted(wanted, horizons_s), MAX_HORIZONS - 1)
        pace_s = np.ones(self._count)
        pace_s[self.numbers] = self.step_s(np.maximum(1.0, self.batch), self.kv_tokens)
        batch, tokens = self._rows.ahead(wanted, pace_s, self._law, now=self._now)
        return batch[self.numbers][:, place], tokens[self.numbers][:, place]
