"""Defaults that work: engines, requests and schedulers for tests, each field open to change."""

from __future__ import annotations

import random
from typing import Any

from gateway.core.admission import AdmissionLimits
from gateway.core.events import EngineFound, EngineHealth
from gateway.core.scheduler import Scheduler
from gateway.core.types import Dispatch, Engine, Estimate, Health, Request, Role
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


def a_scheduler(*engines: Engine, health: Health = Health.UP, **limits: Any) -> Scheduler:
    """A scheduler that knows these engines, all of them up unless `health` says otherwise."""
    scheduler = Scheduler(
        policy=LeastWork(),
        predictor=Online(),
        limits=AdmissionLimits(**limits),
        rng=random.Random(0),
        max_blocks=4096,
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
