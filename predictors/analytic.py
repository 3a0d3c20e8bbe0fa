"""The closed form: what a profile says, nothing learnt.

Right to the last digit when the engine is the engine model of the same profile; on hardware, the base that
`predictors/online.py` corrects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gateway.core.interfaces import DecodeOutcome, HandOffOutcome, PrefillOutcome
from gateway.core.types import Engine, Report
from predictors.profile import WEAK_PRIOR, Profile


@dataclass(frozen=True)
class Analytic:
    """Predicts from one profile for all engines, or from a profile per engine id where one is given."""

    profile: Profile = WEAK_PRIOR
    profiles_by_engine: Mapping[str, Profile] = field(default_factory=dict)
    """Engine id -> profile, for pools of mixed hardware."""

    def start(self) -> Analytic:
        """Itself: it has no state."""
        return self

    def profile_of(self, engine: Engine) -> Profile:
        """The profile used for that engine."""
        return self.profiles_by_engine.get(engine.id, self.profile)

    def prefill_s(self, engine: Engine, *, prompt_tokens: int, cached_tokens: int) -> float:
        """Seconds of the whole prefill on an idle engine, > 0, in steps of the profile's chunk budget."""
        return self.profile_of(engine).whole_prefill_s(max(1, prompt_tokens), max(0, cached_tokens))

    def decode_step_s(self, engine: Engine, *, batch: int, kv_tokens: int) -> float:
        """Seconds of one decode step, > 0."""
        return self.profile_of(engine).decode_s(max(1, batch), max(0, kv_tokens))

    def hand_off_s(
        self, prefills: Sequence[Engine], decodes: Sequence[Engine], *, prompt_tokens: int
    ) -> NDArray[np.float64]:
        """Seconds to move the prompt's KV out of each prefill engine's node alone on its link, shape (P, D)."""
        out_s = np.array([self.profile_of(engine).hand_off_s(prompt_tokens) for engine in prefills], dtype=float)
        return np.repeat(out_s[:, None], len(decodes), axis=1)

    def observe_prefill(self, outcome: PrefillOutcome) -> None:
        """Ignored: a closed form does not learn."""

    def observe_decode(self, outcome: DecodeOutcome) -> None:
        """Ignored: a closed form does not learn."""

    def observe_hand_off(self, outcome: HandOffOutcome) -> None:
        """Ignored: a closed form does not learn."""

    def observe_report(self, engine: Engine, report: Report) -> None:
        """Ignored: a closed form does not learn."""
