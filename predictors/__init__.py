"""Predictors: how long will it take. Pure plug-ins; the table is PREDICTORS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from gateway.core.errors import ConfigError
from gateway.core.interfaces import Predictor
from predictors.analytic import Analytic
from predictors.online import Online
from predictors.polynomial import Polynomial
from predictors.profile import load_profile
from predictors.table import Table

PREDICTORS: dict[str, type[Any]] = {
    "online": Online,
    "analytic": Analytic,
    "polynomial": Polynomial,
    "table": Table,
}
"""Key in the config -> settings class."""

DEFAULT_PREDICTOR = "online"


def predictor(name: str = DEFAULT_PREDICTOR, **settings: Any) -> Predictor:
    """The settings of the named predictor. ConfigError lists the known names, or the known settings of that name.

    A `profile` given as text is the name or path of a profile and is read here, once; a `base` given as text or as a
    mapping with a `name` is a predictor of its own.
    """
    settings_type = PREDICTORS.get(name)
    if settings_type is None:
        raise ConfigError(f"predictor: unknown name {name!r}; known are {', '.join(PREDICTORS)}")
    known = [entry.name for entry in fields(settings_type)]
    for key in settings:
        if key not in known:
            raise ConfigError(f"predictor.{key}: unknown setting of {name!r}; known are {', '.join(known)}")
    built: Predictor = settings_type(**{key: _resolve(key, value) for key, value in settings.items()})
    return built


def _resolve(key: str, value: Any) -> Any:
    if key == "profile" and isinstance(value, str):
        return load_profile(value)
    if key == "base" and isinstance(value, str):
        return predictor(value)
    if key == "base" and isinstance(value, Mapping):
        return predictor(**value)
    return value
