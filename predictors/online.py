"""Learns every time from outcomes: from nothing, or as the corrector of another predictor.

From nothing, a prefill is a line in uncached tokens plus attention, and a decode step a line in batch and KV tokens;
coefficients start at an order of magnitude (`WEAK_PRIOR`) and the first few dozen outcomes replace them. With a base
predictor the coefficients multiply and extend its answer instead. An engine that was not seen yet takes over what its
latest sibling (same pool and role) has learnt.

A prefill's outcome includes its queue. Where the time since the prefill before it ended is known, that is its own time;
prefills that an engine computed in one step end together, the first with all of the time and the others with none, so
such a run is learnt as one sum. Elsewhere the measured time is shared between the queue ahead and the prefill itself in
proportion to what was predicted for each: when the engine is slower than believed both are off by the same factor, so
the factor is right whatever the queue, and a long queue only makes the outcome count less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gateway.core.errors import ConfigError
from gateway.core.interfaces import DecodeOutcome, Estimator, HandOffOutcome, Predictor, PrefillOutcome
from gateway.core.types import Engine, Report, Role
from predictors.engine_times import EngineTimes
from predictors.hand_off import HandOffTimes
from predictors.learner import MAX_S, Features, Learner, Prior
from predictors.profile import WEAK_PRIOR

COLD_PREFILL = Prior(
    mean=(WEAK_PRIOR.prefill_base_s, WEAK_PRIOR.prefill_s_per_token, WEAK_PRIOR.prefill_s_per_square_token),
    spread=(0.3, 1e-2, 2e-8),
)
"""Base, per uncached token, per square token. The last spread is small on purpose: attention that short prompts cannot
show must not be guessed from their noise and then multiplied by the square of a long one."""
COLD_DECODE = Prior(
    mean=(WEAK_PRIOR.decode_base_s, WEAK_PRIOR.decode_s_per_sequence, WEAK_PRIOR.decode_s_per_kv_token),
    spread=(0.3, 1e-2, 1e-6),
)
"""Base, per sequence, per KV token."""
CORRECTED_PREFILL = Prior(mean=(1.0, 0.0, 0.0), spread=(0.3, 0.05, 1e-5))
"""The base predictor's seconds, a constant, per uncached token."""
CORRECTED_DECODE = Prior(mean=(1.0, 0.0, 0.0), spread=(0.3, 0.01, 1e-4))
"""The base predictor's seconds, a constant, per sequence."""


COLD_OUTCOMES = 20
"""An engine of which so many outcomes were seen is known better than by the means that it reports."""
TOGETHER_RATIO = 0.1
"""A prefill that takes less than this of its prediction, against the run before it, was computed together with it."""
MAX_RUN = 64


@dataclass(frozen=True)
class Online:
    """Learns prefill, decode-step and hand-off times per engine; needs no profile."""

    base: Predictor | None = None
    """The predictor to correct; None learns from nothing."""
    window_outcomes: int = 200
    """How many outcomes an engine's coefficients remember; its speed of the moment follows the last few."""
    max_engines: int = 1024
    max_pairs: int = 4096

    def __post_init__(self) -> None:
        for key, least in (("window_outcomes", 10), ("max_engines", 1), ("max_pairs", 1)):
            if getattr(self, key) < least:
                raise ConfigError(f"online.{key}: must be at least {least}, not {getattr(self, key)}")

    def start(self) -> OnlineEstimator:
        """A fresh estimator that has seen nothing."""
        return OnlineEstimator(self)


class OnlineEstimator:
    """A started `Online`."""

    def __init__(self, settings: Online) -> None:
        self._base: Estimator | None = None if settings.base is None else settings.base.start()
        prefill_prior, decode_prior = (
            (COLD_PREFILL, COLD_DECODE) if self._base is None else (CORRECTED_PREFILL, CORRECTED_DECODE)
        )
        self._prefills = _Fleet(Learner(prefill_prior, window_outcomes=settings.window_outcomes), settings.max_engines)
        self._decodes = _Fleet(Learner(decode_prior, window_outcomes=settings.window_outcomes), settings.max_engines)
        self._runs: dict[str, _Run] = {}
        self._max_engines = settings.max_engines
        self._times = EngineTimes(settings.max_engines)
        self._hand_offs = HandOffTimes(max_pairs=settings.max_pairs, window_outcomes=settings.window_outcomes)

    def prefill_s(self, engine: Engine, *, prompt_tokens: int, cached_tokens: int) -> float:
        """Seconds of the prefill on an idle engine, > 0; with nothing observed, of a typical accelerator."""
        return self._prefills.of(engine).predict(self._prefill_features(engine, prompt_tokens, cached_tokens))

    def decode_step_s(self, engine: Engine, *, batch: int, kv_tokens: int) -> float:
        """Seconds of one decode step, > 0."""
        return self._decodes.of(engine).predict(self._decode_features(engine, batch, kv_tokens))

    def hand_off_s(
        self, prefills: Sequence[Engine], decodes: Sequence[Engine], *, prompt_tokens: int
    ) -> NDArray[np.float64]:
        """Seconds to move the prompt's KV, shape (P, D), >= 0; a base predictor's until a transfer was observed."""
        if self._base is not None and not len(self._hand_offs):
            return self._base.hand_off_s(prefills, decodes, prompt_tokens=prompt_tokens)
        return self._hand_offs.hand_off_s(prefills, decodes, prompt_tokens=prompt_tokens)

    def observe_prefill(self, outcome: PrefillOutcome) -> None:
        """Learns from a prefill that ended, its queue taken out of the time."""
        features = self._prefill_features(outcome.engine, outcome.prompt_tokens, outcome.cached_tokens)
        learner = self._prefills.own(outcome.engine)
        predicted_s = learner.predict(features)
        if outcome.busy_s is None:
            share = _own_share(outcome, predicted_s)
            # Weight and time alike: an outcome that was mostly queue says little about the prefill at its end.
            learner.observe(features, outcome.elapsed_s * share, weight=share)
        elif 0.0 <= outcome.busy_s <= MAX_S:
            self._learn_run(outcome.engine.id, learner, _Run(features, outcome.busy_s, predicted_s))

    def _learn_run(self, engine_id: str, learner: Learner, latest: _Run) -> None:
        """Joins an outcome to the run that ended with it, or learns from that run and starts the next."""
        run = self._runs.pop(engine_id, None)
        if run is None:
            run = latest
        elif latest.slowness < TOGETHER_RATIO * run.slowness and run.count < MAX_RUN:
            run = run.joined(latest)
        else:
            learner.observe(run.features, run.seconds)
            run = latest
        self._runs[engine_id] = run
        if len(self._runs) > self._max_engines:
            del self._runs[next(iter(self._runs))]

    def observe_decode(self, outcome: DecodeOutcome) -> None:
        """Learns from a decode that ended."""
        features = self._decode_features(outcome.engine, outcome.batch, outcome.kv_tokens)
        self._decodes.own(outcome.engine).observe(features, outcome.tbt_s)

    def observe_hand_off(self, outcome: HandOffOutcome) -> None:
        """Learns from a transfer that ended."""
        self._hand_offs.observe(outcome)

    def observe_report(self, engine: Engine, report: Report) -> None:
        """Starts from what the engine counted of its own work, as long as few outcomes of it were seen."""
        prefill, gap = self._times.since_last(engine, report)
        if prefill is not None and engine.role is not Role.DECODE and self._prefills.count(engine) < COLD_OUTCOMES:
            features = self._prefill_features(engine, prefill.computed_tokens, 0)
            self._prefills.own(engine).observe(features, prefill.seconds)
        if gap is not None and engine.role is not Role.PREFILL and self._decodes.count(engine) < COLD_OUTCOMES:
            features = self._decode_features(engine, gap.batch, gap.kv_tokens)
            self._decodes.own(engine).observe(features, gap.seconds)

    def _prefill_features(self, engine: Engine, prompt_tokens: int, cached_tokens: int) -> Features:
        length = max(1, prompt_tokens)
        cached = min(max(0, cached_tokens), length - 1)
        if self._base is None:
            return (1.0, float(length - cached), float(length * length - cached * cached))
        base_s = self._base.prefill_s(engine, prompt_tokens=length, cached_tokens=cached)
        return (base_s, 1.0, float(length - cached))

    def _decode_features(self, engine: Engine, batch: int, kv_tokens: int) -> Features:
        batch, kv_tokens = max(1, batch), max(0, kv_tokens)
        if self._base is None:
            return (1.0, float(batch), float(kv_tokens))
        return (self._base.decode_step_s(engine, batch=batch, kv_tokens=kv_tokens), 1.0, float(batch))


@dataclass(frozen=True, slots=True)
class _Run:
    """Prefills that ended together: their features, summed, and the seconds they took between them."""

    features: Features
    seconds: float
    predicted_s: float
    count: int = 1

    @property
    def slowness(self) -> float:
        """Seconds taken per second predicted."""
        return self.seconds / self.predicted_s

    def joined(self, other: _Run) -> _Run:
        """Both as one run."""
        features = tuple(mine + its for mine, its in zip(self.features, other.features, strict=True))
        seconds, predicted_s = self.seconds + other.seconds, self.predicted_s + other.predicted_s
        return _Run(features, seconds, predicted_s, self.count + other.count)


def _own_share(outcome: PrefillOutcome, predicted_now_s: float) -> float:
    """The part of the measured time that was the prefill itself, 0 < share <= 1, by what was predicted at dispatch."""
    ahead_s = outcome.queued_ahead_s
    if not 0.0 < ahead_s < float("inf"):
        return 1.0
    own_s = outcome.predicted_s - ahead_s
    if not 0.0 < own_s < float("inf"):
        own_s = predicted_now_s
    return own_s / (own_s + ahead_s)


class _Fleet:
    """A learner per engine, at most `max_engines`; the least recently observed engine is forgotten first."""

    def __init__(self, fresh: Learner, max_engines: int) -> None:
        self._fresh = fresh
        self._max_engines = max_engines
        self._by_engine: dict[str, Learner] = {}
        self._by_kind: dict[tuple[str, Role], Learner] = {}

    def of(self, engine: Engine) -> Learner:
        """The engine's learner, else its latest sibling's, else one that knows nothing. Not for observing.

        Of a stage that its own kind was not seen at, the other engines of the pool tell: the model is the same.
        """
        own = self._by_engine.get(engine.id)
        if own is not None:
            return own
        others = (self._by_kind.get((engine.pool, role)) for role in (engine.role, *Role))
        return next((learner for learner in others if learner is not None), self._fresh)

    def count(self, engine: Engine) -> int:
        """Outcomes that the engine's own learner has seen."""
        own = self._by_engine.get(engine.id)
        return 0 if own is None else own.count

    def own(self, engine: Engine) -> Learner:
        """The engine's own learner, made from its sibling's when this is its first outcome."""
        learner = self._by_engine.pop(engine.id, None) or self.of(engine).heir()
        self._by_engine[engine.id] = learner
        self._by_kind.pop((engine.pool, engine.role), None)
        self._by_kind[engine.pool, engine.role] = learner
        if len(self._by_engine) > self._max_engines:
            del self._by_engine[next(iter(self._by_engine))]
        if len(self._by_kind) > self._max_engines:
            del self._by_kind[next(iter(self._by_kind))]
        return learner
