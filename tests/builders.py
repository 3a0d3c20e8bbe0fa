"""Defaults that work: engines, requests and schedulers for tests, each field open to change."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gateway.core.admission import AdmissionLimits
from gateway.core.events import EngineFound, EngineHealth
from gateway.core.interfaces import Admission, Chooser, EngineLoad, PairTable
from gateway.core.scheduler import Scheduler
from gateway.core.types import BlockHashes, Dispatch, Engine, Estimate, Health, Request, Role
from gateway.policies.least_work import LeastWork
from predictors.online import Online


def an_engine(engine_id: str = "e1", role: Role = Role.BOTH, **fields: Any) -> Engine:
    return Engine(**{"id": engine_id, "url": f"http://{engine_id}:8000", "role": role, "models": ("m",), **fields})


def a_request(request_id: str = "r1", **fields: Any) -> Request:
    return Request(**{"id": request_id, "model": "m", "arrived_at": 0.0, "prompt_tokens": 100, **fields})


def an_estimate(prefill: str = "p1", decode: str = "d1", **fields: Any) -> Estimate:
    times = {"wait_s": 0.0, "fetch_s": 0.0, "prefill_s": 1.0, "hand_off_s": 0.1, "join_s": 0.05, "tbt_s": 0.05}
    return Estimate(**{"prefill": prefill, "decode": decode, **times, **fields})


def a_dispatch(request_id: str = "r1", **fields: Any) -> Dispatch:
    return Dispatch(request_id, attempt=1, estimate=an_estimate(**fields))


def a_scheduler(
    *engines: Engine,
    health: Health = Health.UP,
    weights: Mapping[str, float] | None = None,
    admission: Admission | None = None,
    **limits: Any,
) -> Scheduler:
    """A scheduler that knows these engines, all of them up unless `health` says otherwise."""
    scheduler = Scheduler(
        policy=LeastWork(),
        predictor=Online(),
        limits=AdmissionLimits(**limits),
        rng=random.Random(0),
        max_blocks=4096,
        tenant_weights=weights,
        admission=admission,
    )
    for engine in engines:
        scheduler.apply(EngineFound(engine), now=0.0)
        scheduler.apply(EngineHealth(engine.id, health), now=0.0)
    return scheduler


def a_pair() -> tuple[Engine, Engine]:
    return an_engine("p1", Role.PREFILL), an_engine("d1", Role.DECODE)


def a_mesh(prefills: int = 2, decodes: int = 2, **fields: Any) -> list[Engine]:
    return [
        *(an_engine(f"p{number}", Role.PREFILL, **fields) for number in range(1, prefills + 1)),
        *(an_engine(f"d{number}", Role.DECODE, **fields) for number in range(1, decodes + 1)),
    ]


def a_load(engine: Engine | str = "e1", role: Role = Role.BOTH, **fields: Any) -> EngineLoad:
    """An idle engine that never reported, unless the fields say otherwise. `own_count` counts as in flight."""
    own_count = fields.get("own_count", 0)
    idle = {
        "engine": an_engine(engine, role) if isinstance(engine, str) else engine,
        "report": None,
        "report_age_s": None,
        "in_flight_count": own_count,
        "queued_count": 0,
        "decoding_count": 0,
        "prefill_work_s": 0.0,
        "queued_tokens": 0,
        "kv_tokens": 0,
        "own_count": own_count,
    }
    return EngineLoad(**{**idle, **fields})


def a_pair_table(
    prefills: Sequence[EngineLoad],
    decodes: Sequence[EngineLoad],
    *,
    cached: Mapping[str, int] | None = None,
    **seconds: Mapping[str, float],
) -> PairTable:
    """Every prefill with every decode. `cached`, `wait_s`, `prefill_s` by prefill id (0), `tbt_s` by decode id (0.05).

    Where both lists are the same engines, each is paired with itself alone.
    """
    is_alone = [load.engine.id for load in prefills] == [load.engine.id for load in decodes]
    grid = np.eye(len(prefills)) if is_alone else np.ones((len(prefills), len(decodes)))
    prefill_row, decode_row = np.nonzero(grid)
    rows = len(prefill_row)

    def column(name: str, loads: Sequence[EngineLoad], row: Any, default: float) -> Any:
        values = seconds.get(name, {})
        return np.array([values.get(load.engine.id, default) for load in loads], dtype=float)[row]

    tokens = [(cached or {}).get(load.engine.id, 0) for load in prefills]
    return PairTable(
        prefills=tuple(prefills),
        decodes=tuple(decodes),
        prefill_row=prefill_row,
        decode_row=decode_row,
        fetch_row=np.full(rows, -1, dtype=np.intp),
        cached_tokens=np.array(tokens, dtype=np.int64)[prefill_row],
        fetched_tokens=np.zeros(rows, dtype=np.int64),
        wait_s=column("wait_s", prefills, prefill_row, 0.0),
        fetch_s=np.zeros(rows),
        prefill_s=column("prefill_s", prefills, prefill_row, 0.0),
        hand_off_s=np.zeros(rows),
        join_s=np.zeros(rows),
        tbt_s=column("tbt_s", decodes, decode_row, 0.05),
        has_room=np.ones(rows, dtype=bool),
        is_local=np.zeros(rows, dtype=bool),
        stall_s=np.zeros(rows),
    )


def rows_of(pairs: PairTable, rows: Sequence[int], **columns: Any) -> PairTable:
    """The table with these rows in this order, and with these columns instead of its own."""
    names = [name for name in PairTable.__slots__ if name not in ("prefills", "decodes")]
    taken = {name: getattr(pairs, name)[list(rows)] for name in names}
    replaced = {name: np.asarray(column) for name, column in columns.items()}
    return PairTable(prefills=pairs.prefills, decodes=pairs.decodes, **{**taken, **replaced})


def pair_at(pairs: PairTable, row: int) -> tuple[str, str]:
    """The ids of that row's engines."""
    return pairs.prefills[pairs.prefill_row[row]].engine.id, pairs.decodes[pairs.decode_row[row]].engine.id


def chosen(chooser: Chooser, request: Request, pairs: PairTable, *, now: float = 0.0) -> tuple[str, str]:
    """The ids of the pair that the policy would choose."""
    return pair_at(pairs, int(np.argmin(chooser.costs(request, pairs, now=now))))


def hashes(*names: int) -> BlockHashes:
    """Block hashes with these values."""
    return np.array(names, dtype=np.uint64)
