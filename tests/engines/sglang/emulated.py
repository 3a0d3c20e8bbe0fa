"""Emulated SGLang engines with the names and settings of the tests' real ones, so that both are recorded alike."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from gateway.core.types import Role
from loadtest.engine_process import MAX_MODEL_TOKENS, MODEL
from loadtest.engine_types import EngineSettings
from loadtest.fake_engine import FakeCluster, FakeEngine, FakeSettings
from loadtest.kv_publisher import KvEventSettings
from loadtest.sglang_process import CAPACITY_TOKENS, PAGE_TOKENS
from loadtest.step_times import LinearStepTimes

TIMES = LinearStepTimes(token_s=3e-4)
"""A prompt of 6,000 tokens takes 2 s, as with the tiny model on a core."""
UNLIKE_SGLANG = {
    "error_wrong_type.json": "the message is another validator's, and names no source file",
    "kv_event_frames.hex": "the emulated engine's events have vLLM's further fields",
    "metrics_prefill.txt": "there is no metrics page: load is read from /v1/loads",
    "metrics_decode.txt": "there is no metrics page: load is read from /v1/loads",
}
"""The recordings that an emulated engine answers otherwise, and how."""


@dataclass(frozen=True, slots=True)
class EmulatedEngine:
    """An emulated engine as tests/engines/sglang/record.py wants it."""

    fake: FakeEngine

    @property
    def url(self) -> str:
        """Base URL of the HTTP server."""
        return self.fake.url

    @property
    def bootstrap_port(self) -> int:
        """Where the bootstrap server of a prefill engine is looked for."""
        return self.fake.bootstrap_port

    @property
    def kv_events_port(self) -> int:
        """Where KV events are published."""
        assert self.fake.publisher is not None, "started with KV events"
        return int(self.fake.publisher.settings.endpoint.rpartition(":")[2])

    async def kill(self) -> None:
        """End it abruptly."""
        await self.fake.die()


@asynccontextmanager
async def emulated_sglang() -> AsyncIterator[dict[str, EmulatedEngine]]:
    """p0 (prefill, KV events), d0 (decode) and s0 (both), whose steps take as long as those of a real one here."""
    async with FakeCluster() as cluster:
        events = KvEventSettings(replay_endpoint="tcp://127.0.0.1:0")
        yield {
            "p0": EmulatedEngine(await cluster.start(settings(Role.PREFILL, events))),
            "d0": EmulatedEngine(await cluster.start(settings(Role.DECODE, None))),
            "s0": EmulatedEngine(await cluster.start(settings(Role.BOTH, events))),
        }


def settings(role: Role, kv_events: KvEventSettings | None) -> FakeSettings:
    """What a real engine of the tests is started with."""
    engine = EngineSettings(
        role=role,
        block_tokens=PAGE_TOKENS,
        kv_blocks=CAPACITY_TOKENS // PAGE_TOKENS,
        max_model_tokens=MAX_MODEL_TOKENS,
    )
    return FakeSettings(engine=engine, times=TIMES, model=MODEL, speaks="sglang", kv_events=kv_events)
