"""Whether engines that are said to hand KV on to one another can: one adapter and one connector for each pool."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from adapters.base import Adapter
from gateway.core.errors import ConfigError
from gateway.core.types import Engine, Role


def pool_fault(engine: Engine, others: Iterable[Engine], adapters: Mapping[str, Adapter]) -> str | None:
    """Why this engine cannot stand in its pool beside the `others`, in a sentence without its name; None: it can.

    Engines that do both stages hand nothing on, whatever their connector.
    """
    if engine.adapter not in adapters:
        return f"there is no adapter {engine.adapter!r} here"
    if engine.role is Role.BOTH:
        return None
    try:
        own = adapters[engine.adapter].connector_name(engine)
    except ConfigError as error:
        return error.message
    for other in others:
        if other.pool != engine.pool or other.role is Role.BOTH or other.adapter not in adapters:
            continue
        theirs = adapters[other.adapter].connector_name(other)
        if (engine.adapter, own) != (other.adapter, theirs):
            return (
                f"{engine.adapter} with connector {own}, but {other.id} of the same pool {engine.pool!r} is "
                f"{other.adapter} with connector {theirs}: neither can read the other's KV"
            )
    return None


def refuse_mixed_pools(engines: Iterable[Engine], adapters: Mapping[str, Adapter]) -> None:
    """Raises ConfigError when two of the engines cannot stand in one pool, or one cannot hand KV on at all."""
    accepted: list[Engine] = []
    for row, engine in enumerate(engines):
        if (fault := pool_fault(engine, accepted, adapters)) is not None:
            raise ConfigError(f"engines[{row}] ({engine.id}): {fault}")
        accepted.append(engine)
