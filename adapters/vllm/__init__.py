"""What vLLM speaks: one leg on engines that do both stages, two by their connector; its metrics and model list."""

from __future__ import annotations

from dataclasses import dataclass, replace

from adapters.base import Exchange, Facts, Payload
from adapters.kv_events import KvEventSource, parse_kv_event_sources
from adapters.vllm import connectors, engine
from adapters.vllm.mooncake import bootstrap_address, parse_query
from adapters.vllm.single import Single
from gateway.core.errors import ConfigError
from gateway.core.types import Engine, Role


@dataclass(frozen=True, slots=True)
class Vllm:
    """Settings of the vLLM adapter."""

    can_continue: bool = True
    health_path: str = "/health"
    report_path: str = "/metrics"
    models_path: str = "/v1/models"
    facts_path: str | None = None
    kv_sources_path: str = "/kv_event_sources"
    tokenize_path: str = "/tokenize"
    lease_s: float = 25.0
    """Time for a decode engine to show that it has the request after its prefill ended. A NIXL prefill engine keeps the
    blocks for 30 s (`kv_lease_duration`); the rest is margin for the decode engine's first heart-beat."""

    def open(self, payload: Payload, prefill: Engine, decode: Engine) -> Exchange:
        """The exchange for one attempt on this pair; one engine twice means a single leg.

        Raises ConfigError when the engines' connectors are two, or one that is not known.
        """
        if prefill.id == decode.id:
            return Single(payload, decode)
        name, other = self.connector_name(prefill), self.connector_name(decode)
        if name != other:
            raise ConfigError(f"engines {prefill.id} ({name}) and {decode.id} ({other}) cannot hand KV on")
        return connectors.CONNECTORS[name].open(payload, prefill, decode, self.lease_s)

    def connector_name(self, engine: Engine) -> str:
        """Our name of the engine's connector. Raises ConfigError that lists the known ones."""
        return connectors.name_of(engine.connector)

    def can_prefill(self, engine: Engine) -> bool:
        """True of a decode engine too, with all connectors but one. Raises ConfigError."""
        return engine.role is not Role.DECODE or connectors.CONNECTORS[self.connector_name(engine)].can_decode_alone

    def hold_s(self, engine: Engine) -> float:
        """Seconds for which a prefill engine keeps blocks that nobody fetches; 0: it keeps none for one reader."""
        return connectors.CONNECTORS[self.connector_name(engine)].hold_s

    def transfer_url(self, engine: Engine) -> str | None:
        """What is asked of a prefill engine before anything can be handed on: its bootstrap server, else nothing."""
        if engine.role is not Role.PREFILL or not connectors.CONNECTORS[self.connector_name(engine)].has_bootstrap:
            return None
        return f"{bootstrap_address(engine)}/query"

    def parse_transfer(self, body: bytes) -> Facts:
        """The engine's ids by data-parallel rank. Raises MalformedEngineData."""
        return Facts(transfer_ids=parse_query(body))

    def parse_report(self, body: bytes) -> Facts:
        """Load and cache facts from `/metrics`. Raises MalformedEngineData."""
        return replace(engine.parse_report(body), connector_families=connectors.families_in(body))

    def contradiction(self, engine: Engine, facts: Facts) -> str | None:
        """Why what the engine tells shows that its settings are wrong; None when nothing does."""
        if engine.role is Role.BOTH:
            return None
        return connectors.contradiction(engine.connector, facts.connector_families)

    def parse_facts(self, body: bytes) -> Facts:
        """Nothing: how a vLLM engine was started stands in its metrics, or nowhere."""
        return Facts()

    def parse_kv_sources(self, body: bytes, *, engine_id: str, host: str) -> tuple[KvEventSource, ...]:
        """Where it publishes KV events, by rank. Raises MalformedEngineData."""
        return parse_kv_event_sources(body, engine_id=engine_id, host=host)

    def parse_models(self, body: bytes) -> Facts:
        """Model names, adapters included, and the longest context. Raises MalformedEngineData."""
        return engine.parse_models(body)
