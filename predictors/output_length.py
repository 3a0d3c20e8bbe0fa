"""How many tokens a request will still produce: a distribution, conditioned on those it has produced.

Lengths are remembered per (model, tenant, prompt group), and more widely per (model, tenant) and per model; the
narrowest history with enough requests speaks. The conditional law is Past-Future's: its quantiles run linearly through
generated, every remembered length above it, and the cap. LightLLM draws samples from that law; here its mean and its
survival function are taken in closed form, as arrays over all running requests, so no decision depends on a draw.
Source: LightLLM's Past-Future scheduler (reference: baseline policies, 5.6), code at f50e8413.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gateway.core.errors import ConfigError

Group: TypeAlias = tuple[str, ...]
"""Model; model and tenant; or model, tenant and prompt group."""


@dataclass(frozen=True)
class OutputLengths:
    """Settings of the output-length histories. Memory is at most `max_groups` x `history_requests` integers."""

    history_requests: int = 200
    """Remembered per group. Source: LightLLM keeps the last 200."""
    min_requests: int = 20
    """A group with fewer leaves the answer to the wider group."""
    max_groups: int = 1024
    cap_tokens: int = 8192
    """Nothing is expected to grow longer, unless a request's own limit says so."""
    tail_ratio: float = 1.5
    """The law ends at this times the longest length seen (or generated), or at the cap if that is nearer. `inf` is
    LightLLM's choice, the cap: safe for memory, but a mean over 20 lengths then gains 200 tokens from a cap of 8192."""
    cold_mean_tokens: float = 256.0
    """Mean of the exponential law believed before anything was seen. Source: Mooncake's traces average 149 to 343."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_requests <= self.history_requests or self.max_groups < 1 or self.cap_tokens < 1:
            raise ConfigError(
                "output_length: must hold 1 <= min_requests <= history_requests, max_groups >= 1, cap_tokens >= 1"
            )
        if not self.tail_ratio >= 1.0 or not self.cold_mean_tokens > 0.0:
            raise ConfigError("output_length: must hold tail_ratio >= 1 and cold_mean_tokens > 0")

    def start(self) -> LengthHistory:
        """Histories that have seen nothing."""
        return LengthHistory(self)


class LengthHistory:
    """Started `OutputLengths`."""

    def __init__(self, settings: OutputLengths) -> None:
        self._settings = settings
        self._groups: dict[Group, _Lengths] = {}
        places = (np.arange(settings.history_requests) + 0.5) / settings.history_requests
        cold = np.clip(-settings.cold_mean_tokens * np.log1p(-places), 1, settings.cap_tokens)
        self._cold = _Lengths(settings.history_requests)
        self._cold.recent.extend(int(value) for value in cold)

    def observe(self, group: Group, output_tokens: int) -> None:
        """Remembers a finished request's output tokens, for its group and each wider one."""
        for width in range(len(group), 0, -1):
            key = group[:width]
            lengths = self._groups.pop(key, None) or _Lengths(self._settings.history_requests)
            self._groups[key] = lengths
            lengths.add(max(1, output_tokens))
            if len(self._groups) > self._settings.max_groups:
                del self._groups[next(iter(self._groups))]

    def remaining_tokens(
        self, group: Group, generated: ArrayLike, *, limit_tokens: ArrayLike | None = None
    ) -> NDArray[np.float64]:
        """Expected tokens still to come of each request, shape (requests,), >= 0; at most limit - generated.

        `limit_tokens` is each request's max_output_tokens, `inf` for none.
        """
        lengths, done, cap = self._case(group, generated, limit_tokens)
        above, total = lengths.above(done, cap)
        return np.maximum(0.0, (0.5 * done + total + 0.5 * cap) / (above + 1) - done)

    def survival(
        self, group: Group, generated: ArrayLike, ahead: ArrayLike, *, limit_tokens: ArrayLike | None = None
    ) -> NDArray[np.float64]:
        """P(still running after `ahead` more tokens), shape (requests, horizons), 1 at 0 and falling to 0.

        `generated` and `limit_tokens` have shape (requests,), `ahead` (horizons,) or (requests, horizons), >= 0.
        """
        lengths, done, cap = self._case(group, generated, limit_tokens)
        ends = done[:, None] + np.atleast_2d(np.asarray(ahead, dtype=float))
        return lengths.survival(done[:, None], ends, cap[:, None])

    def _case(
        self, group: Group, generated: ArrayLike, limit_tokens: ArrayLike | None
    ) -> tuple[_Lengths, NDArray[np.float64], NDArray[np.float64]]:
        lengths = self._narrowest(group)
        done = np.maximum(0.0, np.atleast_1d(np.asarray(generated, dtype=float)))
        cap = np.full(done.shape, float(self._settings.cap_tokens))
        if limit_tokens is not None:
            limit = np.asarray(limit_tokens, dtype=float)
            cap = np.where(np.isfinite(limit), limit, cap)
        tail_end = self._settings.tail_ratio * np.maximum(done, lengths.longest())
        return lengths, done, np.maximum(done, np.minimum(cap, tail_end))

    def _narrowest(self, group: Group) -> _Lengths:
        for width in range(len(group), 0, -1):
            lengths = self._groups.get(group[:width])
            if lengths is not None and len(lengths.recent) >= self._settings.min_requests:
                return lengths
        return self._cold


class _Lengths:
    """The latest lengths of one group, with their sorted form made when asked for."""

    def __init__(self, history_requests: int) -> None:
        self.recent: deque[int] = deque(maxlen=history_requests)
        self._sorted: NDArray[np.float64] | None = None
        self._sums = np.zeros(1)

    def add(self, tokens: int) -> None:
        self.recent.append(tokens)
        self._sorted = None

    def longest(self) -> float:
        return float(self._in_order()[-1])

    def _in_order(self) -> NDArray[np.float64]:
        if self._sorted is None:
            self._sorted = np.sort(np.array(self.recent, dtype=float))
            self._sums = np.concatenate([[0.0], np.cumsum(self._sorted)])
        return self._sorted

    def above(
        self, done: NDArray[np.float64], cap: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """How many lengths exceed `done`, and their sum with each counted as at most `cap`."""
        ordered = self._in_order()
        first = np.searchsorted(ordered, done, side="right")
        capped = np.maximum(first, np.searchsorted(ordered, cap, side="left"))
        total = self._sums[capped] - self._sums[first] + (len(ordered) - capped) * cap
        return (len(ordered) - first).astype(float), total

    def survival(
        self, done: NDArray[np.float64], ends: NDArray[np.float64], cap: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """P(length > ends given length > done), by linear interpolation between the conditional quantiles."""
        ordered = self._in_order()
        first = np.searchsorted(ordered, done, side="right")
        passed = np.searchsorted(ordered, ends, side="right")
        low = np.where(passed > first, ordered[np.maximum(passed - 1, 0)], done)
        high = np.minimum(np.append(ordered, np.inf)[passed], cap)
        part = np.clip((ends - low) / np.maximum(high - low, 1e-9), 0.0, 1.0)
        survival = 1.0 - (passed - first + part) / (len(ordered) - first + 1)
        return np.where(ends >= cap, 0.0, survival)
