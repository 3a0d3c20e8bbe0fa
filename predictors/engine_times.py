"""What an engine counted between two of its reports, as the mean request and the mean token of that time.

Counters tell nothing of single requests, so a mean is all there is: enough to start from, where the alternative is the
order of magnitude of a typical accelerator.
"""

from __future__ import annotations

from dataclasses import dataclass

from gateway.core.types import Engine, Report, StageTimes


@dataclass(frozen=True, slots=True)
class MeanPrefill:
    """The mean of some prefills."""

    computed_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class MeanGap:
    """The mean gap between tokens, and the batch that its engine has."""

    batch: int
    kv_tokens: int
    seconds: float


class EngineTimes:
    """The last counters of each engine, at most `max_engines`; the one that reported longest ago is forgotten first."""

    def __init__(self, max_engines: int) -> None:
        self._max_engines = max_engines
        self._last: dict[str, StageTimes] = {}

    def since_last(self, engine: Engine, report: Report) -> tuple[MeanPrefill | None, MeanGap | None]:
        """The means since its report before, or since it started; None where nothing was counted."""
        times = report.times
        if times is None:
            return None, None
        last = self._last.pop(engine.id, StageTimes())
        self._last[engine.id] = times
        if len(self._last) > self._max_engines:
            del self._last[next(iter(self._last))]
        if times.prefill_count < last.prefill_count or times.gap_count < last.gap_count:
            last = StageTimes()  # it started anew
        return _mean_prefill(times, last), _mean_gap(times, last, engine, report)


def _mean_prefill(times: StageTimes, last: StageTimes) -> MeanPrefill | None:
    count = times.prefill_count - last.prefill_count
    if count < 1:
        return None
    tokens = max(1, (times.computed_tokens - last.computed_tokens) // count)
    return MeanPrefill(tokens, (times.prefill_s - last.prefill_s) / count)


def _mean_gap(times: StageTimes, last: StageTimes, engine: Engine, report: Report) -> MeanGap | None:
    """Of an engine that was busy before and is idle now the batch is not known: one is the careful guess."""
    count = times.gap_count - last.gap_count
    if count < 1:
        return None
    kv_tokens = round((report.kv_usage_ratio or 0.0) * (engine.kv_capacity_tokens or 0))
    return MeanGap(max(1, report.running_count), kv_tokens, (times.gap_s - last.gap_s) / count)
