"""Preble's E2: exploit the engines that hold most of the prompt, or explore for the least loaded engine."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass

import numpy as np

from gateway.core.interfaces import PairTable
from gateway.core.types import Dispatch, Request
from gateway.policies.approximate_index import ApproximateIndex
from gateway.policies.prompt_blocks import prompt_blocks
from gateway.policies.stage import Costs, Stage, fewest_in_flight, prefill_then_decode

MAX_REMEMBERED = 65_536
"""Requests in the window at most: 364 per second for its three minutes; of more, the oldest are forgotten."""


@dataclass(frozen=True, slots=True)
class PrebleE2:
    """More cached than new tokens: the least loaded holder of the longest match; else the least loaded engine of all.

    load_i = predicted prefill seconds of the requests sent to i in the last three minutes
           + requests in flight on i x output tokens x predicted TPOT of i (engines that decode)

    The first term is what Preble's sum over tree nodes, miss rate x count x prefill time / replicas, estimates. When
    the highest load passes 1.5 times the lowest, hits of the most loaded engine go to the least loaded one. Preble
    does not know disaggregation: the decode engine is the one with the fewest requests in flight. Left out: its
    eviction cost (what the new prompt would push out) and copies of a single hot node.
    Source: baseline-policies section 5.5; arXiv:2407.00023, section 3.
    """

    window_s: float = 180.0
    output_tokens: int = 343
    """Expected output length. Source: mean of the Mooncake conversation trace."""
    rebalance_ratio: float = 1.5
    max_tree_tokens: int = 3_000_000
    """Of each engine's prompts. Source: a node's cache in the Mooncake paper, section 5.3.1; Preble asks engines."""

    def start(self, rng: random.Random) -> PrebleE2Chooser:
        return PrebleE2Chooser(self)


class PrebleE2Chooser:
    """Remembers the prompts it sent to each engine, and their predicted prefill times for the length of the window."""

    def __init__(self, settings: PrebleE2) -> None:
        self._settings = settings
        self._index = ApproximateIndex()
        self._sent: deque[tuple[float, str, int]] = deque()
        """When, to which prefill engine, and its predicted prefill time in whole microseconds: no sum drifts."""
        self._sent_us: dict[str, int] = {}
        """Sums of `_sent` by engine; those that are 0 are not kept."""

    def costs(self, request: Request, pairs: PairTable, *, now: float) -> Costs:
        """By exploit or explore for prefill, then by requests in flight for decode; shape (pairs,)."""
        self._forget(now)
        blocks = prompt_blocks(request)

        def rule(stage: Stage) -> Costs:
            load_s = self._load_s(stage)
            matched = self._index.matched_blocks(blocks.hashes, stage.engine_ids, now=now)
            cached_tokens = int(matched.max()) * blocks.block_tokens
            if request.prompt_tokens - cached_tokens >= cached_tokens:
                return load_s
            holders = np.where(matched == matched.max(), load_s, np.inf)
            is_imbalanced = load_s.max() > self._settings.rebalance_ratio * load_s.min()
            return load_s if is_imbalanced and holders.min() == load_s.max() else holders

        return prefill_then_decode(pairs, rule, fewest_in_flight)

    def dispatched(self, request: Request, dispatch: Dispatch, *, now: float) -> None:
        """The prompt joins the prefill engine's tree, its predicted prefill time the window."""
        blocks, engine_id = prompt_blocks(request), dispatch.estimate.prefill
        max_blocks = self._settings.max_tree_tokens // blocks.block_tokens
        self._index.insert(engine_id, blocks.hashes, max_blocks=max_blocks, now=now)
        prefill_us = round(dispatch.estimate.prefill_s * 1e6)
        self._sent.append((now, engine_id, prefill_us))
        self._sent_us[engine_id] = self._sent_us.get(engine_id, 0) + prefill_us
        self._forget(now)

    def _load_s(self, stage: Stage) -> Costs:
        """Load of each candidate in seconds, shape (candidates,)."""
        prefill_s = np.array([self._sent_us.get(engine_id, 0) / 1e6 for engine_id in stage.engine_ids])
        decode_s = stage.own_counts * self._settings.output_tokens * stage.pairs.tbt_s[stage.rows]
        return prefill_s + np.where(stage.does_both, decode_s, 0.0)

    def _forget(self, now: float) -> None:
        while self._sent and (self._sent[0][0] < now - self._settings.window_s or len(self._sent) > MAX_REMEMBERED):
            _, engine_id, prefill_us = self._sent.popleft()
            left_us = self._sent_us[engine_id] - prefill_us
            if left_us:
                self._sent_us[engine_id] = left_us
            else:
                del self._sent_us[engine_id]
