"""Finds a plug-in by its name in a table, or as `module:Class`, and makes its settings."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import TypeVar

import msgspec

from gateway.core.errors import ConfigError

T = TypeVar("T")


def plug_in(kind: str, table: Mapping[str, type[T]], name: str, settings: Mapping[str, object]) -> T:
    """The plug-in's settings object. Raises ConfigError that lists the known names, or the plug-in's own fields."""
    plugin = table.get(name) or outside(kind, table, name)
    if not is_dataclass(plugin):
        raise ConfigError(f"{kind}.name: {name!r} is no dataclass of settings")
    known = [field.name for field in fields(plugin)]
    for key in settings:
        if key not in known:
            listed = ", ".join(known) or "none"
            raise ConfigError(f"{kind}.settings.{key}: unknown setting of {name!r}; known: {listed}")
    try:
        return msgspec.convert(dict(settings), plugin)
    except (msgspec.ValidationError, TypeError, ValueError) as error:
        raise ConfigError(f"{kind}.settings: {error}") from None


def outside(kind: str, table: Mapping[str, type[T]], name: str) -> type[T]:
    """A plug-in that lives outside the tree."""
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(f"{kind}.name: unknown {name!r}; known: {', '.join(table)}, or module:Class")
    try:
        found: type[T] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{kind}.name: cannot load {name!r}: {error}") from None
    return found
