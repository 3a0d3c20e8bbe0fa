"""Power of two choices."""

import random
from collections import Counter

from gateway.core.interfaces import EngineLoad
from gateway.core.types import Report
from gateway.policies.load.power_of_two import Mode, PowerOfTwo
from tests.builders import a_load, a_pair_table, a_request, chosen


def wins(policy: PowerOfTwo, *engines: EngineLoad) -> Counter[str]:
    chooser = policy.start(random.Random(1))
    pairs = a_pair_table(engines, engines)
    return Counter(chosen(chooser, a_request(), pairs, now=5.0)[0] for _ in range(1000))


def reporting(engine_id: str, own_count: int, **fields: float) -> EngineLoad:
    return a_load(engine_id, own_count=own_count, report=Report(0, 0, **fields), report_age_s=1.0)


def test_the_less_loaded_of_two_wins() -> None:
    """Of 3 engines with loads 0, 1, 2 the pairs {0,1} and {0,2} give the first, {1,2} the second: 2/3 and 1/3."""
    counts = wins(PowerOfTwo(), a_load("a"), a_load("b", own_count=1), a_load("c", own_count=2))
    assert abs(counts["a"] / 1000 - 2 / 3) < 0.05
    assert counts["a"] + counts["b"] == 1000


def test_kv_usage_decides_when_both_report_it() -> None:
    counts = wins(PowerOfTwo(), reporting("a", 9, kv_usage_ratio=0.1), reporting("b", 0, kv_usage_ratio=0.2))
    assert counts == {"a": 1000}


def test_one_silent_engine_means_counts_decide() -> None:
    assert wins(PowerOfTwo(), reporting("a", 9, kv_usage_ratio=0.1), a_load("b")) == {"b": 1000}


def test_expected_wait_decides_in_the_newer_mode() -> None:
    """a: 500 tokens at 250 per second, 2 s; b: 1000 at 1000, 1 s, in spite of its higher usage and count."""
    a = reporting("a", 0, kv_usage_ratio=0.0, waiting_uncached_tokens=500, gen_tokens_per_s=250.0)
    b = reporting("b", 9, kv_usage_ratio=0.1, waiting_uncached_tokens=1000, gen_tokens_per_s=1000.0)
    assert wins(PowerOfTwo(mode=Mode.EXPECTED_WAIT), a, b) == {"b": 1000}


def test_one_engine_is_no_choice() -> None:
    assert wins(PowerOfTwo(), a_load("a")) == {"a": 1000}
