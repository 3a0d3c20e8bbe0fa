"""The engine model against what theory and vLLM's rules say of it."""

from __future__ import annotations

from dataclasses import replace

from loadtest.engine import Engine
from loadtest.engine_types import (
    EngineRequest,
    EngineSettings,
    Outcome,
)
from loadtest.fabric import Fabric
from loadtest.step_times import LinearStepTimes

TIMES = LinearStepTimes()
SMALL = EngineSettings(
    block_tokens=4, kv_blocks=64, step_tokens=64, batch_limit=8, max_model_tokens=128, vocabulary=tuple(range(50))
)


def engine(fabric: Fabric | None = None, id: str = "e", **changes: object) -> Engine:
    return Engine(id, replace(SMALL, **changes), TIMES, fabric)


def sized(id: str, prompt: int, output: int, **more: object) -> EngineRequest:
    return EngineRequest(id, prompt, output, **more)  # type: ignore[arg-type]


def spoken(id: str, tokens: range | tuple[int, ...], output: int = 8, **more: object) -> EngineRequest:
    ids = tuple(tokens)
    return EngineRequest(id, len(ids), output, token_ids=ids, is_eos_ignored=True, **more)  # type: ignore[arg-type]


def drain(*engines: Engine, until: float = 1e6) -> list[Outcome]:
    """Steps the engines in time order until nothing is due before `until`."""
    out: list[Outcome] = []
    now = 0.0
    while True:
        due = [(at, i) for i, e in enumerate(engines) if (at := e.next_step_at()) is not None and at < until]
        if not due:
            return out
        at, i = min(due)
        now = max(now, at)
        out += engines[i].step(now=now)


def of(kind, outcomes):  # type: ignore[no-untyped-def]
    return [o for o in outcomes if isinstance(o, kind)]
