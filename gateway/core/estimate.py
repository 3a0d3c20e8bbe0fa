"""Predictor x ledger -> what every candidate pair would give this request.

Predict per engine, combine per pair: one predictor call for each prefill and each decode engine, then sums over index
arrays. A pair is two engines of one pool (a hand-off), or one engine that does both stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from gateway.core.fetch import with_fetches
from gateway.core.forecast import Forecast
from gateway.core.interfaces import EngineLoad, Estimator, PairTable
from gateway.core.types import Engine, Estimate, Request, Role


def may_prefill(engine: Engine) -> bool:
    """Whether the engine takes the prefill half of a hand-off."""
    return engine.role is Role.PREFILL


def may_decode(engine: Engine) -> bool:
    """Whether the engine takes the decode half of a hand-off."""
    return engine.role is Role.DECODE


def may_do_both(engine: Engine, request: Request) -> bool:
    """Whether the engine serves this request alone: engines of role both always, a decode engine when it must."""
    if engine.role is Role.BOTH:
        return True
    return engine.role is Role.DECODE and engine.can_serve_alone and not request.can_hand_off


def pair_rows(
    request: Request, prefills: Sequence[EngineLoad], decodes: Sequence[EngineLoad]
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The candidate pairs as two index arrays of shape (pairs,), in the order of (prefill, decode)."""
    pool_names = sorted({load.engine.pool for load in (*prefills, *decodes)})
    pool_number = {name: number for number, name in enumerate(pool_names)}
    prefill_pool = np.array([pool_number[load.engine.pool] for load in prefills], dtype=np.intp)
    decode_pool = np.array([pool_number[load.engine.pool] for load in decodes], dtype=np.intp)
    hands_off = np.array([request.can_hand_off and may_prefill(load.engine) for load in prefills], dtype=bool)
    takes_over = np.array([may_decode(load.engine) for load in decodes], dtype=bool)
    is_pair = (prefill_pool[:, None] == decode_pool[None, :]) & hands_off[:, None] & takes_over[None, :]
    column = {load.engine.id: index for index, load in enumerate(decodes)}
    for row, load in enumerate(prefills):
        if may_do_both(load.engine, request):
            is_pair[row, column[load.engine.id]] = True
    prefill_row, decode_row = np.nonzero(is_pair)
    return prefill_row, decode_row


def estimate_pairs(
    request: Request,
    loads: Sequence[EngineLoad],
    estimator: Estimator,
    cached_tokens: NDArray[np.int64],
    forecast: Forecast | None = None,
) -> PairTable:
    """Predicts every pair among `loads` (sorted by engine id); `forecast` is of those among them that decode.

    The step is that of the batch when the prefill ends; without a forecast, that of everybody sent to the engine.

    `cached_tokens` has shape (loads,): prompt tokens whose KV that engine already holds, 0 <= cached < prompt_tokens.
    """
    is_prefill = [may_prefill(load.engine) or may_do_both(load.engine, request) for load in loads]
    is_decode = [load.engine.role is not Role.PREFILL for load in loads]
    prefills = tuple(load for load, is_candidate in zip(loads, is_prefill, strict=True) if is_candidate)
    decodes = tuple(load for load, is_candidate in zip(loads, is_decode, strict=True) if is_candidate)
    cached = cached_tokens[np.array(is_prefill, dtype=bool)] if loads else cached_tokens
    prefill_row, decode_row = pair_rows(request, prefills, decodes)
    length = request.prompt_tokens
    wait_s = np.array([load.prefill_work_s for load in prefills], dtype=float)
    prefill_s = np.array(
        [
            estimator.prefill_s(load.engine, prompt_tokens=length, cached_tokens=int(tokens))
            for load, tokens in zip(prefills, cached, strict=True)
        ],
        dtype=float,
    )
    step_s = np.array(
        [
            estimator.decode_step_s(
                load.engine, batch=load.decoding_count + load.queued_count + 1, kv_tokens=load.kv_tokens + length
            )
            for load in decodes
        ],
        dtype=float,
    )
    hand_off_s = estimator.hand_off_s(
        [load.engine for load in prefills], [load.engine for load in decodes], prompt_tokens=length
    )
    is_moved = np.array(
        [prefills[p].engine.id != decodes[d].engine.id for p, d in zip(prefill_row, decode_row, strict=True)],
        dtype=bool,
    )
    pairs = PairTable(
        prefills=prefills,
        decodes=decodes,
        prefill_row=prefill_row,
        decode_row=decode_row,
        fetch_row=np.full(len(prefill_row), -1, dtype=np.intp),
        cached_tokens=cached[prefill_row],
        fetched_tokens=np.zeros(len(prefill_row), dtype=np.int64),
        wait_s=wait_s[prefill_row],
        fetch_s=np.zeros(len(prefill_row)),
        prefill_s=prefill_s[prefill_row],
        hand_off_s=np.where(is_moved, hand_off_s[prefill_row, decode_row], 0.0),
        join_s=np.where(is_moved, step_s[decode_row], 0.0),
        tbt_s=step_s[decode_row],
        has_room=np.ones(len(prefill_row), dtype=bool),
    )
    pairs = with_fetches(request, pairs, estimator, cached)
    return pairs if forecast is None or len(pairs) == 0 else with_forecast(request, pairs, forecast)


def with_forecast(request: Request, pairs: PairTable, forecast: Forecast) -> PairTable:
    """The table with the step of each pair's decode engine at the instant at which its prefill will end."""
    ends_s = pairs.wait_s + pairs.fetch_s + pairs.prefill_s
    instants_s, place = np.unique(ends_s, return_inverse=True)
    batch, kv_tokens = forecast.ahead(instants_s)
    batch, kv_tokens = batch + 1.0, kv_tokens + request.prompt_tokens
    tbt_s = forecast.step_s(batch, kv_tokens)[pairs.decode_row, place]
    has_room = (kv_tokens <= forecast.capacity_tokens[:, None])[pairs.decode_row, place]
    return replace(pairs, tbt_s=tbt_s, join_s=np.where(pairs.join_s > 0.0, tbt_s, 0.0), has_room=has_room)


def estimate_at(pairs: PairTable, row: int) -> Estimate:
    """One row of the table as a value."""
    holder = int(pairs.fetch_row[row])
    return Estimate(
        prefill=pairs.prefills[pairs.prefill_row[row]].engine.id,
        decode=pairs.decodes[pairs.decode_row[row]].engine.id,
        wait_s=float(pairs.wait_s[row]),
        fetch_s=float(pairs.fetch_s[row]),
        prefill_s=float(pairs.prefill_s[row]),
        hand_off_s=float(pairs.hand_off_s[row]),
        join_s=float(pairs.join_s[row]),
        tbt_s=float(pairs.tbt_s[row]),
        cached_tokens=int(pairs.cached_tokens[row]),
        fetch_from=None if holder < 0 else pairs.prefills[holder].engine.id,
        fetched_tokens=int(pairs.fetched_tokens[row]),
    )
