"""The KV connectors of vLLM that can be driven from outside: names, choreography, what they hold and tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, TypeAlias

from adapters.base import Exchange, Payload
from adapters.vllm.in_turn import InTurn
from adapters.vllm.mooncake import open_mooncake
from adapters.vllm.moriio import Moriio
from adapters.vllm.nixl import Nixl
from adapters.vllm.store import Store
from gateway.core.errors import ConfigError
from gateway.core.types import Engine

Opener: TypeAlias = Callable[[Payload, Engine, Engine, float], Exchange]


@dataclass(frozen=True, slots=True)
class Connector:
    """One way of handing KV on."""

    open: Opener
    """The exchange of one attempt, from the payload, the pair and the lease in seconds."""
    hold_s: float
    """How long a prefill engine keeps blocks that nobody fetches, at the engine's defaults; 0: it keeps none."""
    class_names: tuple[str, ...]
    """What the engine's `--kv-transfer-config` calls it."""
    metrics: tuple[str, ...] = ()
    """Prefixes of the metrics by which an engine shows that it was started with it."""
    can_decode_alone: bool = True
    """Whether a decode engine with it computes the prompt of a request that brings no transfer parameters."""
    has_bootstrap: bool = False
    """Whether prefill engines are asked who they are before anything can be handed on."""


def _nixl(mode: str | None) -> Opener:
    return lambda payload, prefill, decode, lease_s: InTurn(payload, prefill, decode, Nixl(lease_s, mode))


def _store(payload: Payload, prefill: Engine, decode: Engine, lease_s: float) -> Exchange:
    return InTurn(payload, prefill, decode, Store())


def _moriio(payload: Payload, prefill: Engine, decode: Engine, lease_s: float) -> Exchange:
    return InTurn(payload, prefill, decode, Moriio(lease_s))


_NIXL_METRICS: Final = ("vllm:nixl_",)
_STORE_METRICS: Final = ("vllm:mooncake_store_", "vllm:kv_offload_", "vllm:hf3fs_")

# Sources of `hold_s`, vllm 0.32.0: nixl/base_scheduler.py `kv_lease_duration`; mooncake/mooncake_connector.py
# VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT; moriio/moriio_common.py VLLM_MORI_READ_ABORT_REQUEST_TIMEOUT.
# Of `can_decode_alone`: `get_num_new_matched_tokens` of each; MoRIIO's in READ mode takes every request of a decode
# engine for one whose KV is elsewhere.
CONNECTORS: Final[Mapping[str, Connector]] = MappingProxyType(
    {
        "nixl": Connector(_nixl(None), 30.0, ("NixlConnector",), _NIXL_METRICS),
        "nixl_pull": Connector(_nixl("pull"), 30.0, ("NixlPullConnector",), _NIXL_METRICS),
        "nixl_push": Connector(_nixl("push"), 30.0, ("NixlPushConnector",), _NIXL_METRICS),
        "mooncake": Connector(open_mooncake, 480.0, ("MooncakeConnector",), has_bootstrap=True),
        "moriio": Connector(_moriio, 3600.0, ("MoRIIOConnector",), can_decode_alone=False),
        "multi": Connector(_nixl(None), 30.0, ("MultiConnector",), (*_NIXL_METRICS, *_STORE_METRICS)),
        "store": Connector(
            _store,
            0.0,
            (
                "ExampleConnector",
                "MooncakeStoreConnector",
                "LMCacheConnectorV1",
                "LMCacheMPConnector",
                "OffloadingConnector",
                "SimpleCPUOffloadConnector",
                "HF3FSKVConnector",
                "FlexKVConnectorV1",
            ),
            _STORE_METRICS,
        ),
    }
)

_BY_CLASS: Final = {name: key for key, connector in CONNECTORS.items() for name in connector.class_names}
FAMILIES: Final = tuple(sorted({prefix for connector in CONNECTORS.values() for prefix in connector.metrics}))


def name_of(connector: str) -> str:
    """Our name of a connector given by ours or by vLLM's. Raises ConfigError that lists the known ones."""
    name = _BY_CLASS.get(connector, connector)
    if name not in CONNECTORS:
        known = ", ".join((*CONNECTORS, *_BY_CLASS))
        raise ConfigError(f"connector {connector!r} is none that vllm hands KV on with; known: {known}")
    return name


def families_in(report: bytes) -> tuple[str, ...]:
    """The families of connectors whose metrics stand in an engine's report."""
    return tuple(prefix for prefix in FAMILIES if prefix.encode() in report)


def contradiction(connector: str, families: tuple[str, ...]) -> str | None:
    """Why an engine that shows these families was not started with that connector; None when nothing says so."""
    own = CONNECTORS[name_of(connector)].metrics
    if not families or any(family in own for family in families):
        return None
    shown = ", ".join(family.removeprefix("vllm:").rstrip("_") for family in families)
    return f"the settings say connector {connector}, its metrics are those of {shown}"
