"""Expected wait as SMG 1.13 computes it: the last report, and what was sent since.

    score_i = (uncached tokens waiting there + tokens sent since its report) / tokens per second + 0.15 k / (1 - k)

with k the KV usage. SMG routes by it alone (`least_load`), in `power_of_two`, and where `cache_aware` has no match.
Source: baseline-policies section 5.3, read from SMG 1.13.0.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gateway.core.interfaces import EngineLoad
from gateway.core.types import Report, Request
from gateway.policies.settings import require
from gateway.policies.stage import MAX_ENGINES, Costs

SAME_INSTANT_S = 1e-6
"""Report instants are rebuilt from ages: the same one comes out a few units in the last place apart."""
MAX_KV_USAGE_RATIO = 0.999
MIN_TOKENS_PER_S = 1.0
"""An engine that reports less was idle: that is not its speed."""


@dataclass(frozen=True, slots=True)
class WaitSettings:
    """Constants of the score, with SMG's defaults."""

    kv_pressure_s: float = 0.15
    """Weight of the KV term, seconds at a usage of one half."""
    default_tokens_per_s: float = 2000.0
    """For engines that do not report their throughput."""
    mean_prefill_tokens: int = 1024
    """For engines that report waiting requests, not their tokens."""

    def __post_init__(self) -> None:
        require(self.default_tokens_per_s > 0, "default_tokens_per_s > 0")


@dataclass(slots=True)
class SinceReport:
    """What was sent to one engine since the report of that instant."""

    reported_at: float
    tokens: int = 0
    count: int = 0


class WaitScore:
    """The score, and the bookkeeping of what was sent since each engine's last report."""

    def __init__(self, settings: WaitSettings) -> None:
        self._settings = settings
        self._since: OrderedDict[str, SinceReport] = OrderedDict()

    def score(self, loads: Sequence[EngineLoad], *, now: float) -> Costs:
        """Expected seconds of waiting at each engine, shape (loads,). When none reported: its requests of ours.

        An engine without a report counts as the best of its peers plus its requests of ours at their mean speed.
        """
        own_counts = np.array([load.own_count for load in loads], dtype=float)
        is_dark = np.array([load.report is None for load in loads], dtype=bool)
        if is_dark.all():
            return own_counts
        scores = np.array([self._known(load, now) for load in loads])
        speeds = [self._tokens_per_s(load.report) for load in loads if load.report is not None]
        unseen_s = own_counts * self._settings.mean_prefill_tokens / (sum(speeds) / len(speeds))
        return np.where(is_dark, scores[~is_dark].min() + unseen_s, scores)

    def waiting_count(self, load: EngineLoad, *, now: float) -> int:
        """Requests waiting there by its last report, and those sent since."""
        if load.report is None:
            return 0
        return load.report.waiting_count + self._since_report(load, now).count

    def sent(self, request: Request, engine_ids: Sequence[str]) -> None:
        """The request went to these engines."""
        for engine_id in engine_ids:
            since = self._since.get(engine_id)
            if since is not None:
                since.tokens += request.prompt_tokens
                since.count += 1

    def _known(self, load: EngineLoad, now: float) -> float:
        report, settings = load.report, self._settings
        if report is None:
            return 0.0
        queued_tokens = report.waiting_uncached_tokens
        if queued_tokens is None:
            queued_tokens = report.waiting_count * settings.mean_prefill_tokens
        usage = min(report.kv_usage_ratio or 0.0, MAX_KV_USAGE_RATIO)
        tokens = queued_tokens + self._since_report(load, now).tokens
        return tokens / self._tokens_per_s(report) + settings.kv_pressure_s * usage / (1 - usage)

    def _tokens_per_s(self, report: Report) -> float:
        speed = report.gen_tokens_per_s
        return self._settings.default_tokens_per_s if speed is None or speed < MIN_TOKENS_PER_S else speed

    def _since_report(self, load: EngineLoad, now: float) -> SinceReport:
        """What was sent since the engine's last report; a newer report than the one known starts from zero."""
        reported_at = now - (load.report_age_s or 0.0)
        since = self._since.get(load.engine.id)
        if since is None or reported_at > since.reported_at + SAME_INSTANT_S:
            since = self._since[load.engine.id] = SinceReport(reported_at)
        self._since.move_to_end(load.engine.id)
        while len(self._since) > MAX_ENGINES:
            self._since.popitem(last=False)
        return since
