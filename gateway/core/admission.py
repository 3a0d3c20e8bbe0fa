"""What refuses under every rule (no engine could serve the request however long it waited), and the rule `none`."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.core.cluster import Cluster
from gateway.core.estimate import may_decode, may_do_both, may_prefill
from gateway.core.interfaces import Arrival, PrefillEnd
from gateway.core.types import Engine, Health, Reject, RejectReason, Request
from gateway.core.waiting import STARVE_S


@dataclass(frozen=True, slots=True)
class AdmitAll:
    """Refuses nobody: what can be served is served, however late."""

    def start(self) -> AdmitAll:
        return self

    def arrive(self, arrival: Arrival, *, now: float) -> None:
        """Any pair will do."""

    def end_prefill(self, prefill: PrefillEnd, *, now: float) -> None:
        """Every decode begins."""


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """Bounds on what the gateway takes in."""

    max_in_flight_per_engine: int = 256
    max_waiting: int = 1024
    max_wait_s: float = 30.0
    max_attempts: int = 3
    observed_age_s: float = 600.0
    """How long a guessed block is believed in without being used."""
    max_starve_s: float = STARVE_S
    """A class of which a request waits gets a turn at least so often."""

    def room(self, engine: Engine) -> int:
        """Requests that the engine takes at once."""
        return engine.max_in_flight or self.max_in_flight_per_engine

    def serves(self, engine: Engine, request: Request) -> bool:
        """Whether the engine has the model; one whose model list is not known may have it. No model named: any."""
        return not engine.models or not request.model or request.model in engine.models


def refuse_unservable(request: Request, cluster: Cluster, limits: AdmissionLimits) -> Reject | None:
    """A refusal when no engine that is up could serve the request; None when one could, room or not."""
    engines = [state.engine for state in cluster.engines.values()]
    serving = [engine for engine in engines if limits.serves(engine, request)]
    if engines and not serving:
        models = ", ".join(sorted({model for engine in engines for model in engine.models}))
        message = f"The model `{request.model}` does not exist. Models served here: {models}"
        return Reject(request.id, RejectReason.UNKNOWN_MODEL, message)
    if request.attempt > limits.max_attempts:
        message = f"{limits.max_attempts} attempts failed before the first token"
        return Reject(request.id, RejectReason.TOO_MANY_ATTEMPTS, message)
    limit_tokens = max((engine.max_model_tokens or request.prompt_tokens for engine in serving), default=0)
    if request.is_prompt_exact and serving and request.prompt_tokens > limit_tokens:
        message = f"The prompt has {request.prompt_tokens} tokens; the model takes at most {limit_tokens}"
        return Reject(request.id, RejectReason.PROMPT_TOO_LONG, message)
    return refuse_missing_role(request, serving, cluster)


def refuse_missing_role(request: Request, serving: list[Engine], cluster: Cluster) -> Reject | None:
    """A refusal that names the role nobody fills; None when one pool (or one engine alone) can serve the request."""
    up = [engine for engine in serving if cluster.engines[engine.id].health is Health.UP]
    if any(may_do_both(engine, request) for engine in up):
        return None
    decode_pools = [engine.pool for engine in up if may_decode(engine)]
    if request.can_hand_off and any(may_prefill(engine) and engine.pool in decode_pools for engine in up):
        return None
    if decode_pools:
        return Reject(request.id, RejectReason.NO_PREFILL, "no prefill engine is up")
    return Reject(request.id, RejectReason.NO_DECODE, "no decode engine is up")
