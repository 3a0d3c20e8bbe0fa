"""Plug-ins: what an engine speaks. To add one: a file here, a row in ADAPTERS, a test, a line in the README."""

from __future__ import annotations

from typing import Final

from adapters.base import Adapter
from adapters.sglang import Sglang
from adapters.vllm import Vllm
from gateway.core.errors import ConfigError

ADAPTERS: Final[dict[str, type[Adapter]]] = {"sglang": Sglang, "vllm": Vllm}


def adapter(name: str) -> type[Adapter]:
    """The adapter of that name; its constructor takes its settings. Raises ConfigError that lists the known names."""
    try:
        return ADAPTERS[name]
    except KeyError:
        raise ConfigError(f"adapter {name!r} is unknown; known: {', '.join(sorted(ADAPTERS))}") from None
