from __future__ import annotations

from dataclasses import dataclass

import pytest

from gateway.core.errors import ConfigError
from gateway.plugins import plug_in


@dataclass(frozen=True)
class Heavy:
    factor: float = 1.0


TABLE = {"heavy": Heavy}


def test_a_name_in_the_table_gives_its_settings():
    assert plug_in("policy", TABLE, "heavy", {}) == Heavy()
    assert plug_in("policy", TABLE, "heavy", {"factor": 2}) == Heavy(2.0)


def test_a_plug_in_outside_the_table_is_named_by_module_and_class():
    assert plug_in("policy", {}, f"{Heavy.__module__}:Heavy", {"factor": 3}) == Heavy(3.0)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("light", "policy.name: unknown 'light'; known: heavy, or module:Class"),
        ("", "policy.name: unknown ''; known: heavy"),
        ("nowhere:X", "policy.name: cannot load 'nowhere:X'"),
        ("gateway.plugins:Nothing", "policy.name: cannot load 'gateway.plugins:Nothing'"),
        (":X", "policy.name: cannot load ':X'"),
        ("fractions:Fraction", "policy.name: 'fractions:Fraction' is no dataclass of settings"),
    ],
)
def test_an_unknown_name_is_refused(name, said):
    with pytest.raises(ConfigError) as caught:
        plug_in("policy", TABLE, name, {})
    assert caught.value.message.startswith(said)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"factor": "much"}, "policy.settings: Expected `float`, got `str`"),
        ({"weight": 1}, "policy.settings.weight: unknown setting of 'heavy'; known: factor"),
    ],
)
def test_wrong_settings_are_refused(settings, said):
    with pytest.raises(ConfigError) as caught:
        plug_in("policy", TABLE, "heavy", settings)
    assert caught.value.message.startswith(said)
