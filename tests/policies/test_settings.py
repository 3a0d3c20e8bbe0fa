"""Settings that cannot work are refused when they are made, and by name."""

import pytest

from gateway.core.errors import ConfigError
from gateway.plugins import plug_in
from gateway.policies import POLICIES
from gateway.policies.settings import require


def test_a_rule_that_holds_is_silent() -> None:
    require(True, "1 > 0")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("prefix_affinity", {"max_ttft_ratio": 0.5}),
        ("dynamo_kv", {"block_tokens": 0}),
        ("prefix_hash", {"ring_points_per_engine": 0}),
        ("smg_cache_aware", {"hits_per_diversion": 0}),
        ("llm_d_sticky", {"peak_prefill_tokens_per_s": 0.0}),
        ("llm_d_predicted_latency", {"ttft_weight": 0.0, "tpot_weight": 0.0}),
        ("expected_wait", {"wait": {"default_tokens_per_s": 0.0}}),
        ("power_of_two", {"mode": "three"}),
    ],
)
def test_settings_that_divide_by_zero_or_mean_nothing_are_config_errors(name: str, settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"policy\.settings"):
        plug_in("policy", POLICIES, name, settings)


def test_settings_nest() -> None:
    policy = plug_in("policy", POLICIES, "power_of_two", {"mode": "expected_wait", "wait": {"kv_pressure_s": 0.3}})
    assert policy.wait.kv_pressure_s == 0.3
