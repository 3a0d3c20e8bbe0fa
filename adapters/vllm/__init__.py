"""What vLLM speaks: one leg on engines that do both stages, two legs for a NIXL pull, its metrics and model list."""

from __future__ import annotations

from dataclasses import dataclass

from adapters.base import Exchange, Facts, Payload
from adapters.kv_events import KvEventSource, parse_kv_event_sources
from adapters.vllm import engine
from adapters.vllm.nixl_pull import NixlPull
from adapters.vllm.single import Single
from gateway.core.errors import ConfigError
from gateway.core.types import Engine

CONNECTORS = ("nixl",)


@dataclass(frozen=True, slots=True)
class Vllm:
    """Settings of the vLLM adapter."""

    health_path: str = "/health"
    report_path: str = "/metrics"
    models_path: str = "/v1/models"
    kv_sources_path: str = "/kv_event_sources"
    tokenize_path: str = "/tokenize"
    lease_s: float = 25.0
    """Time for a decode engine to show that it has the request after its prefill ended. The prefill engine keeps the
    blocks for 30 s (`kv_lease_duration`); the rest is margin for the decode engine's first heart-beat."""

    def open(self, payload: Payload, prefill: Engine, decode: Engine) -> Exchange:
        """The exchange for one attempt on this pair; one engine twice means a single leg.

        Raises ConfigError when the engines' connector is not one of `CONNECTORS`.
        """
        if prefill.id == decode.id:
            return Single(payload, decode)
        if prefill.connector not in CONNECTORS or decode.connector != prefill.connector:
            raise ConfigError(
                f"engines {prefill.id} ({prefill.connector}) and {decode.id} ({decode.connector}): "
                f"vllm hands off between engines of one connector of {', '.join(CONNECTORS)}"
            )
        return NixlPull(payload, prefill, decode, self.lease_s)

    def parse_report(self, body: bytes) -> Facts:
        """Load and cache facts from `/metrics`. Raises MalformedEngineData."""
        return engine.parse_report(body)

    def parse_kv_sources(self, body: bytes, *, engine_id: str, host: str) -> tuple[KvEventSource, ...]:
        """Where it publishes KV events, by rank. Raises MalformedEngineData."""
        return parse_kv_event_sources(body, engine_id=engine_id, host=host)

    def parse_models(self, body: bytes) -> Facts:
        """Model names, adapters included, and the longest context. Raises MalformedEngineData."""
        return engine.parse_models(body)
