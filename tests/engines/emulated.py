"""Emulated engines with the names and settings of the real ones in the tests, so that both can be recorded alike."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from gateway.core.types import Role
from loadtest.engine_types import EngineSettings
from loadtest.fake_engine import FakeCluster, FakeEngine, FakeSettings
from loadtest.kv_publisher import KvEventSettings
from loadtest.vllm_process import BLOCK_TOKENS, MAX_MODEL_TOKENS, MODEL

UNLIKE_VLLM = {
    "chat_logprobs.sse": "the emulated engine refuses to give log probabilities",
    "error_prompt_too_long_stream.json": "vLLM stops counting a text's tokens at the limit, and says so in the message",
    "error_wrong_type.json": "the message is another validator's",
}
"""The recordings that an emulated engine answers otherwise, and how."""


@dataclass(frozen=True, slots=True)
class EmulatedEngine:
    """An emulated engine as tests/engines/record.py wants it."""

    fake: FakeEngine

    @property
    def url(self) -> str:
        """Base URL of the HTTP server."""
        return self.fake.url

    @property
    def kv_events_port(self) -> int:
        """Where KV events are published."""
        assert self.fake.publisher is not None, "started with KV events"
        return int(self.fake.publisher.settings.endpoint.rpartition(":")[2])

    async def kill(self) -> None:
        """End it abruptly."""
        await self.fake.die()


@asynccontextmanager
async def emulated_fleet() -> AsyncIterator[dict[str, EmulatedEngine]]:
    """p0 (prefill, KV events) and d0 (decode), ten times as fast as the clock."""
    async with FakeCluster(speed=10) as cluster:
        events = KvEventSettings(replay_endpoint="tcp://127.0.0.1:0")
        yield {
            "p0": EmulatedEngine(await cluster.start(settings(Role.PREFILL, events))),
            "d0": EmulatedEngine(await cluster.start(settings(Role.DECODE, None))),
        }


def settings(role: Role, kv_events: KvEventSettings | None) -> FakeSettings:
    """What a real engine of the tests is started with."""
    engine = EngineSettings(role=role, block_tokens=BLOCK_TOKENS, max_model_tokens=MAX_MODEL_TOKENS)
    return FakeSettings(engine=engine, model=MODEL, has_prompt_tokens_details=True, kv_events=kv_events)
