"""Predictor x ledger -> what every candidate pair would give this request.

Predict per engine, combine per pair: one predictor call for each prefill and each decode engine, then sums over index
arrays. A pair is two engines of one pool (a hand-off), or one engine that does both stages. A decode engine is one of
these too, where a policy weighs it: it computes the prompt in the steps of its batch, so there is no transfer, and
everybody in the batch has a step that is longer by that prefill.
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

LOCAL_JOIN_STEPS = 1.5
"""Steps of the batch that a prefill on a decode engine waits for: half of the one under way, and the one it is in."""
COLUMNS = tuple(name for name in PairTable.__slots__ if name not in ("prefills", "decodes"))


def may_prefill(engine: Engine) -> bool:
    """Whether the engine takes the prefill half of a hand-off."""
    return engine.role is Role.PREFILL


def may_decode(engine: Engine) -> bool:
    """Whether the engine takes the decode half of a hand-off."""
    return engine.role is Role.DECODE


def may_do_both(engine: Engine, request: Request, *, offers_local: bool = False) -> bool:
    """Whether the engine serves this request alone: engines of role both always, a decode engine when it must or may.

    It may where `offers_local` says that the choice is to be offered.
    """
    if engine.role is Role.BOTH:
        return True
    return engine.role is Role.DECODE and engine.can_serve_alone and (offers_local or not request.can_hand_off)


def pair_rows(
    request: Request, prefills: Sequence[EngineLoad], decodes: Sequence[EngineLoad], *, offers_local: bool = False
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
        if may_do_both(load.engine, request, offers_local=offers_local):
            is_pair[row, column[load.engine.id]] = True
    prefill_row, decode_row = np.nonzero(is_pair)
    return prefill_row, decode_row


def estimate_pairs(
    request: Request,
    loads: Sequence[EngineLoad],
    estimator: Estimator,
    cached_tokens: NDArray[np.int64],
    forecast: Forecast | None = None,
    *,
    offers_local: bool = False,
) -> PairTable:
    """Predicts every pair among `loads` (sorted by engine id); `forecast` is of those among them that decode.

    With `offers_local` each decode engine that can prefill is a pair of its own too.

    The step is that of the batch when the prefill ends; without a forecast, that of everybody sent to the engine.

    `cached_tokens` has shape (loads,): prompt tokens whose KV that engine already holds, 0 <= cached < prompt_tokens.
    """
    is_prefill = [
        may_prefill(load.engine) or may_do_both(load.engine, request, offers_local=offers_local) for load in loads
    ]
    is_decode = [load.engine.role is not Role.PREFILL for load in loads]
    prefills = tuple(load for load, is_candidate in zip(loads, is_prefill, strict=True) if is_candidate)
    decodes = tuple(load for load, is_candidate in zip(loads, is_decode, strict=True) if is_candidate)
    cached = cached_tokens[np.array(is_prefill, dtype=bool)] if loads else cached_tokens
    prefill_row, decode_row = pair_rows(request, prefills, decodes, offers_local=offers_local)
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
    own_row = {load.engine.id: row for row, load in enumerate(decodes)}
    decodes_at = np.array([own_row.get(load.engine.id, -1) for load in prefills], dtype=np.intp)
    is_moved = decodes_at[prefill_row] != decode_row
    is_local = np.array([load.engine.role is Role.DECODE for load in prefills], dtype=bool)[prefill_row]
    has_batch = np.array([load.decoding_count > 0 for load in decodes], dtype=bool)[decode_row]
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
        join_s=step_s[decode_row] * np.where(is_moved, 1.0, np.where(is_local & has_batch, LOCAL_JOIN_STEPS, 0.0)),
        tbt_s=step_s[decode_row],
        has_room=np.ones(len(prefill_row), dtype=bool),
        is_local=is_local,
        stall_s=np.where(is_local, wait_s[prefill_row] + prefill_s[prefill_row], 0.0),
    )
    pairs = with_local_work(with_fetches(request, pairs, estimator, cached))
    return pairs if forecast is None or len(pairs) == 0 else with_forecast(request, pairs, forecast)


def with_local_work(pairs: PairTable) -> PairTable:
    """The table with what the prefills under way on decode engines mean for hand-offs that arrive there before they
    end: a first token that is later, and a gap."""
    work_s = np.array([load.prefill_work_s if load.queued_tokens else 0.0 for load in pairs.decodes], dtype=float)
    if not work_s.any():
        return pairs
    arrives_s = pairs.wait_s + pairs.fetch_s + pairs.prefill_s + pairs.hand_off_s
    is_moved = pairs.join_s > 0.0
    late_s = np.where(is_moved & ~pairs.is_local, np.maximum(0.0, work_s[pairs.decode_row] - arrives_s), 0.0)
    return replace(pairs, stall_s=pairs.stall_s + late_s, join_s=pairs.join_s + late_s)


def kept_rows(pairs: PairTable, is_kept: NDArray[np.bool_]) -> PairTable:
    """The table with these rows only; `is_kept` has shape (pairs,)."""
    if is_kept.all():
        return pairs
    columns = {name: getattr(pairs, name)[is_kept] for name in COLUMNS}
    return replace(pairs, **columns)


def breaks_promise(
    request: Request, pairs: PairTable, forecast: Forecast, *, prefill_margin: float, decode_margin: float
) -> NDArray[np.bool_]:
    """The local pairs whose prefill would make a step longer than some bound there, shape (pairs,).

    Of those who decode there or will, and the request's own: no gap of anybody is longer than his bound. Margins are
    factors that make quantiles of the predictions. A request that cannot be handed on has no other choice.
    """
    if not request.can_hand_off or not pairs.is_local.any():
        return np.zeros(len(pairs), dtype=bool)
    own_bound_s = np.inf if request.slo.step_s is None else request.slo.step_s
    bound_s = np.minimum(forecast.tightest_s, own_bound_s)[pairs.decode_row]
    step_s = decode_margin * pairs.tbt_s + prefill_margin * pairs.stall_s
    broken: NDArray[np.bool_] = pairs.is_local & ((step_s > bound_s) | ~pairs.has_room)
    return broken


def with_forecast(request: Request, pairs: PairTable, forecast: Forecast) -> PairTable:
    """The table with the step of each pair's decode engine at the instant at which its prefill will end."""
    ends_s = pairs.wait_s + pairs.fetch_s + pairs.prefill_s
    instants_s, place = np.unique(ends_s, return_inverse=True)
    batch, kv_tokens = forecast.ahead(instants_s)
    batch, kv_tokens = batch + 1.0, kv_tokens + request.prompt_tokens
    tbt_s = forecast.step_s(batch, kv_tokens)[pairs.decode_row, place]
    has_room = (kv_tokens <= forecast.capacity_tokens[:, None])[pairs.decode_row, place]
    steps = np.where(pairs.is_local, LOCAL_JOIN_STEPS, 1.0)
    late_s = np.where(pairs.is_local, 0.0, pairs.stall_s)
    join_s = np.where(pairs.join_s > 0.0, steps * tbt_s + late_s, 0.0)
    return replace(pairs, tbt_s=tbt_s, join_s=join_s, has_room=has_room)


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
        stall_s=float(pairs.stall_s[row]),
    )
