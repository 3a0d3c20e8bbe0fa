"""How full a decode engine is, or will be: the requests in its batch and the KV tokens they hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from gateway.core.cluster import Cluster, EngineState, Reservation
from gateway.core.types import Role


@dataclass(frozen=True, slots=True)
class DecodeLoad:
    """A batch."""

    batch: int
    kv_tokens: int


def decoding_engines(cluster: Cluster) -> Iterator[EngineState]:
    """The engines that decode, ascending by id."""
    return (state for state in cluster.engines.values() if state.engine.role is not Role.PREFILL)


def load_of(reservations: Iterable[Reservation]) -> DecodeLoad:
    """The batch that these requests make."""
    batch = kv_tokens = 0
    for reservation in reservations:
        batch += 1
        kv_tokens += reservation.request.prompt_tokens + reservation.output_tokens
    return DecodeLoad(batch, kv_tokens)


def present_load(state: EngineState, *, but: str) -> DecodeLoad:
    """Those whose prefill is over, the request `but` left out: what a look at the engine shows."""
    decoding = state.decoding.values()
    return load_of(r for r in decoding if r.handed_at is not None and r.request.id != but)
