"""SMG 1.13's cache-aware routing: the longest match behind a spill gate, else the shortest expected wait."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gateway.core.interfaces import EngineLoad, PairTable
from gateway.core.types import Dispatch, Request
from gateway.policies.approximate_index import ApproximateIndex
from gateway.policies.prompt_blocks import prompt_blocks
from gateway.policies.settings import require
from gateway.policies.stage import Costs, Stage, lexicographic, prefill_then_decode
from gateway.policies.wait_score import WaitScore, WaitSettings


@dataclass(frozen=True, slots=True)
class SmgCacheAware:
    """The matched engine unless it is vetoed or spills; a miss or a spill goes to the shortest expected wait.

    The decode engine is the one with the shortest expected wait: its prefix arrives with the hand-off. Vetoes that hit
    every engine are void, and a spill with nowhere to go stays. Two readings of the help text: "2 sigma of the mean" is
    2 sqrt(mean), the noise of a count; the "thin" engine that gets one hit in eight is the one with the fewest blocks
    of its own. Left out: the slower start of engines in their first minute (a policy does not see an engine's age) and
    what is 0 by default.
    Source: baseline-policies section 5.3, read from SMG 1.13.0's help text and parts of its source.
    """

    cache_threshold_ratio: float = 0.3
    """Share of the prompt that must match for the match to count."""
    balance_abs_count: int = 64
    balance_rel_ratio: float = 1.5
    """Spills: in flight over this multiple of the mean, and over the mean plus `balance_abs_count` (capped)."""
    min_abs_count: int = 4
    """The cap on `balance_abs_count` is 2 sqrt(mean), at least this."""
    hits_per_diversion: int = 8
    veto_waiting_count: int = 8
    veto_kv_usage_ratio: float = 0.8
    max_tree_tokens: int = 2**26
    wait: WaitSettings = field(default_factory=WaitSettings)

    def __post_init__(self) -> None:
        require(self.hits_per_diversion > 0, "hits_per_diversion > 0")

    def start(self, rng: random.Random) -> SmgCacheAwareChooser:
        return SmgCacheAwareChooser(self)

    def spills(self, counts: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Whether each engine has too much in flight to take its hits, shape of `counts`: (engines,)."""
        mean = counts.mean()
        excess = min(self.balance_abs_count, max(self.min_abs_count, 2 * np.sqrt(mean)))
        is_over: NDArray[np.bool_] = (counts > self.balance_rel_ratio * mean) & (counts > mean + excess)
        return is_over

    def vetoes(self, load: EngineLoad) -> bool:
        """Whether the engine's own report rules it out."""
        report = load.report
        if report is None:
            return False
        return (
            report.waiting_count >= self.veto_waiting_count
            or (report.kv_usage_ratio or 0.0) >= self.veto_kv_usage_ratio
        )


class SmgCacheAwareChooser:
    """Remembers the prompts it sent to each engine, what went there since its last report, and counts hits."""

    def __init__(self, settings: SmgCacheAware) -> None:
        self._settings = settings
        self._index = ApproximateIndex()
        self._score = WaitScore(settings.wait)
        self._hit_count = 0
        self._hit_id: str | None = None
        """The request of the latest decision if it was a hit."""

    def costs(self, request: Request, pairs: PairTable, *, now: float) -> Costs:
        """By match or expected wait for prefill, then by expected wait for decode, shape (pairs,)."""
        self._hit_id = None

        def by_match(stage: Stage) -> Costs:
            wait = self._open_wait(stage, now)
            takes_hits = np.isfinite(wait) & ~self._settings.spills(stage.own_counts)
            matched = self._matched(request, stage, now)
            is_match = (matched > 0) & (matched == matched.max())
            hits = np.flatnonzero(takes_hits & is_match)
            if len(hits) == 0:
                skipped = np.where(is_match, np.inf, wait)
                return skipped if np.isfinite(skipped).any() else wait
            self._hit_id = request.id
            winner = hits[int(np.argmin(wait[hits]))]
            if (self._hit_count + 1) % self._settings.hits_per_diversion == 0:
                winner = self._thin(stage, takes_hits)
            ranks = lexicographic(np.arange(len(stage)) != winner, wait)
            return np.where(np.isfinite(wait), ranks, np.inf)

        return prefill_then_decode(pairs, by_match, lambda stage: self._open_wait(stage, now))

    def dispatched(self, request: Request, dispatch: Dispatch, *, now: float) -> None:
        """The prompt joins the prefill engine's tree."""
        blocks, estimate = prompt_blocks(request), dispatch.estimate
        max_blocks = self._settings.max_tree_tokens // blocks.block_tokens
        self._index.insert(estimate.prefill, blocks.hashes, max_blocks=max_blocks, now=now)
        self._score.sent(request, sorted({estimate.prefill, estimate.decode}))
        self._hit_count += self._hit_id == request.id

    def _open_wait(self, stage: Stage, now: float) -> Costs:
        """Expected wait; +inf where the engine is vetoed, unless all are."""
        wait = self._score.score(stage.loads, now=now)
        is_vetoed = np.array([self._settings.vetoes(load) for load in stage.loads], dtype=bool)
        return wait if is_vetoed.all() else np.where(is_vetoed, np.inf, wait)

    def _matched(self, request: Request, stage: Stage, now: float) -> NDArray[np.int64]:
        """Blocks matched at each candidate, shape (candidates,); all 0 when even the best is under the threshold."""
        blocks = prompt_blocks(request)
        matched = self._index.matched_blocks(blocks.hashes, stage.engine_ids, now=now)
        enough = self._settings.cache_threshold_ratio * request.prompt_tokens
        return matched if matched.max() * blocks.block_tokens > enough else np.zeros_like(matched)

    def _thin(self, stage: Stage, takes_hits: NDArray[np.bool_]) -> int:
        """Of the candidates that take hits the one with the fewest blocks."""
        block_counts = np.array([self._index.block_count(engine_id) for engine_id in stage.engine_ids], dtype=float)
        return int(np.argmin(np.where(takes_hits, block_counts, np.inf)))
