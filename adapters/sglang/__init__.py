"""What SGLang speaks: one leg on engines that do both stages, two legs at once that meet in a bootstrap room."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from adapters.base import Exchange, Facts, Payload
from adapters.kv_events import KvEventSource, parse_server_info
from adapters.refusal import Refusal
from adapters.sglang import bodies, engine, rooms
from adapters.sglang.pair import Pair
from adapters.sglang.single import Single
from gateway.core.errors import ConfigError
from gateway.core.types import Engine, Role

TRANSFER_TIMEOUT_S = 300.0
"""SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT and _WAITING_TIMEOUT, by default. Source: sglang 0.5.23, environ.py."""


@dataclass(frozen=True, slots=True)
class Sglang:
    """Settings of the SGLang adapter."""

    can_continue: bool = False
    """What a chat begun elsewhere would need was not tried on it: a stream that breaks ends with an error event."""
    health_path: str = "/ready"
    """Cheap. `/health` generates a token and takes a second, and in a busy engine its turn among the requests."""
    report_path: str = "/v1/loads"
    """Read from shared memory, so that a scheduler in the middle of a long step does not delay it."""
    models_path: str = "/v1/models"
    facts_path: str | None = "/server_info"
    kv_sources_path: str = "/server_info"
    tokenize_path: str = "/tokenize"
    decode_within_s: float = 25.0
    """Time for a streaming decode engine to show its first token after the prefill engine said that the KV is over."""
    rng: random.Random = field(default_factory=random.SystemRandom)
    """Where rooms come from: gateways that share engines must not draw the same ones."""

    def open(self, payload: Payload, prefill: Engine, decode: Engine) -> Exchange:
        """The exchange for one attempt on this pair, in a room of its own; one engine twice means a single leg.

        Raises ConfigError when their page sizes differ: the decode engine would die of it.
        """
        if prefill.block_tokens != decode.block_tokens and None not in (prefill.block_tokens, decode.block_tokens):
            raise ConfigError(
                f"engines {prefill.id} and {decode.id} have pages of {prefill.block_tokens} and {decode.block_tokens} "
                "tokens: sglang hands off between engines of one --page-size"
            )
        if (token := bodies.token_beyond(payload, prefill)) is not None:
            return Refusal(f"Token id {token} is beyond the model's vocabulary.", "prompt")
        room = rooms.draw(self.rng, payload, rooms.rank_count(prefill))
        # A request id in use is refused, and an abort takes all ids that begin with its own: all have the same length.
        rid = f"{payload.request_id}-{room:016x}"
        if prefill.id == decode.id:
            return Single(payload, decode, rid)
        return Pair(payload, prefill, decode, rid, room, self.decode_within_s)

    def connector_name(self, engine: Engine) -> str:
        """Two engines meet in a bootstrap room, whatever carries the KV between them."""
        return "bootstrap"

    def can_prefill(self, engine: Engine) -> bool:
        """False of a decode engine: it refuses a request without a bootstrap room, and with one waits for a prefill."""
        return engine.role is not Role.DECODE

    def hold_s(self, engine: Engine) -> float:
        """Seconds for which a prefill engine keeps blocks that nobody fetches; an abort, which we send, frees them."""
        return TRANSFER_TIMEOUT_S

    def transfer_url(self, engine: Engine) -> None:
        """Nothing more is asked: `/server_info` told where its bootstrap server is."""

    def parse_transfer(self, body: bytes) -> Facts:
        """Nothing."""
        return Facts()

    def contradiction(self, engine: Engine, facts: Facts) -> None:
        """Nothing that its report tells; a wrong role is found when it starts."""

    def parse_report(self, body: bytes) -> Facts:
        """Load and cache facts from `/v1/loads`, or from `/metrics`. Raises MalformedEngineData."""
        return engine.parse_report(body)

    def parse_kv_sources(self, body: bytes, *, engine_id: str, host: str) -> tuple[KvEventSource, ...]:
        """Where it publishes KV events, by rank. Raises MalformedEngineData."""
        return parse_server_info(body, engine_id=engine_id, host=host)

    def parse_models(self, body: bytes) -> Facts:
        """Model names, adapters included, and the longest context. Raises MalformedEngineData."""
        return engine.parse_models(body)

    def parse_facts(self, body: bytes) -> Facts:
        """How it was started, from `/server_info`. Raises MalformedEngineData."""
        return engine.parse_facts(body)
