"""Dynamo's KV router: blocks to compute after the cached ones, plus blocks held in decode."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from gateway.core.interfaces import PairTable
from gateway.core.types import Dispatch, Request
from gateway.policies.lottery import draw_order, draw_weighted
from gateway.policies.settings import require
from gateway.policies.stage import Costs, Stage, lexicographic, prefill_then_decode


@dataclass(frozen=True, slots=True)
class DynamoKv:
    """Lowest cost in blocks, ties at random.

    raw_i    = blocks of prefill active on i + blocks of this prompt
    credit_i = c d_i m_i,  d_i = 1 / (1 + decay (active prefill tokens_i - the least) / B / blocks of this prompt)
    prefill  = P max(0, raw_i - credit_i) + w active requests_i
    decode   = decode blocks_i, this prompt's included, + w active requests_i       (overlap counts nothing there)
    both     = prefill + decode blocks_i

    with m_i the prompt blocks that i holds by its KV events. All of them count as in device memory (c = 1): the pair
    table does not tell tiers apart, so Dynamo's lower credits for host (0.75) and disk (0.25) are left out. Decode
    blocks include output so far, which Dynamo counts only with its `router_track_output_blocks`.
    Source: baseline-policies section 5.2; defaults of the 1.6.1 wheel's `kv_router_args.py`.
    """

    overlap_credit: float = 1.0
    """c"""
    prefill_load_scale: float = 1.0
    """P"""
    credit_decay: float = 0.0
    active_request_weight: float = 0.0
    """w"""
    temperature: float = 0.0
    """0: the lowest cost; above, softmax of -cost / (range of costs x temperature)."""
    block_tokens: int = 16
    """B, where the request's block hashes do not say."""

    def __post_init__(self) -> None:
        require(self.block_tokens > 0, "block_tokens > 0")
        require(self.temperature >= 0, "temperature >= 0")

    def start(self, rng: random.Random) -> DynamoKvChooser:
        return DynamoKvChooser(self, rng)


@dataclass(frozen=True, slots=True)
class DynamoKvChooser:
    """Costs from the ledger's counts; the generator breaks ties."""

    settings: DynamoKv
    rng: random.Random

    def costs(self, request: Request, pairs: PairTable, *, now: float) -> Costs:
        """By Dynamo's cost or by its softmax, prefill before decode, shape (pairs,)."""
        return prefill_then_decode(
            pairs,
            lambda stage: self._pick(self.prefill_cost(request, stage)),
            lambda stage: self._pick(self.decode_cost(request, stage)),
        )

    def dispatched(self, request: Request, dispatch: Dispatch, *, now: float) -> None:
        """Nothing to remember: the ledger holds what is active."""

    def prefill_cost(self, request: Request, stage: Stage) -> Costs:
        """Cost of the prefill, and of the decode where one engine does both, in blocks; shape (candidates,)."""
        settings, size = self.settings, self._block_tokens(request)
        new_blocks = -(-request.prompt_tokens // size)
        active_tokens = np.array([load.queued_tokens for load in stage.loads], dtype=float)
        decay = 1 / (1 + settings.credit_decay * (active_tokens - active_tokens.min()) / size / new_blocks)
        credit = settings.overlap_credit * decay * (stage.held_tokens // size)
        costs: Costs = settings.prefill_load_scale * np.maximum(0.0, active_tokens / size + new_blocks - credit)
        costs += np.where(stage.does_both, self._decode_blocks(request, stage), 0.0)
        costs += settings.active_request_weight * stage.own_counts
        return costs

    def decode_cost(self, request: Request, stage: Stage) -> Costs:
        """Cost of the decode in blocks, shape (candidates,)."""
        return self._decode_blocks(request, stage) + self.settings.active_request_weight * stage.own_counts

    def _decode_blocks(self, request: Request, stage: Stage) -> Costs:
        size = self._block_tokens(request)
        held = np.array([-(-load.kv_tokens // size) for load in stage.loads], dtype=float)
        return held + -(-request.prompt_tokens // size)

    def _block_tokens(self, request: Request) -> int:
        return min(request.block_hashes, default=self.settings.block_tokens)

    def _pick(self, costs: Costs) -> Costs:
        spread = float(np.ptp(costs))
        if self.settings.temperature > 0 and spread > 0:
            weights = np.exp(-(costs - costs.min()) / (spread * self.settings.temperature))
            return draw_weighted(self.rng, weights)
        return lexicographic(costs, draw_order(self.rng, len(costs)))
