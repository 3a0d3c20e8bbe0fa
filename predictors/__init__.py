"""Predictors: how long will it take. Pure plug-ins; the table is PREDICTORS."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from gateway.core.errors import ConfigError
from gateway.core.interfaces import Predictor
from predictors.analytic import Analytic
from predictors.online import Online
from predictors.profile import load_profile

PREDICTORS: dict[str, type[Any]] = {
    "analytic": Analytic,
    "online": Online,
}
"""Key in the config -> settings class."""

DEFAULT_PREDICTOR = "online"


def predictor(name: str = DEFAULT_PREDICTOR, **settings: Any) -> Predictor:
    """The settings of the named predictor. ConfigError lists the known names, or the known settings of that name.

    A `profile` given as text is the name or the path of a profile and is read here, once.
    """
    settings_type = PREDICTORS.get(name)
    if settings_type is None:
        raise ConfigError(f"predictor: unknown name {name!r}; known are {', '.join(PREDICTORS)}")
    known = [entry.name for entry in fields(settings_type)]
    for key, value in settings.items():
        if key not in known:
            raise ConfigError(f"predictor.{key}: unknown setting of {name!r}; known are {', '.join(known)}")
        if key == "profile" and isinstance(value, str):
            settings[key] = load_profile(value)
    built: Predictor = settings_type(**settings)
    return built
