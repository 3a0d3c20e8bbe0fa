"""Shares converge to weights, nothing is saved up or held against anyone, and the accounts stay bounded."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.fairness import CREDIT_S, Fairness

START_S = -30.0
"""The first to come begins with its whole credit of 30 s."""
WEIGHTS = st.dictionaries(st.sampled_from("abcd"), st.floats(0.1, 10.0), min_size=2)


@given(weights=WEIGHTS, costs=st.lists(st.floats(0.01, 3.0), min_size=5, max_size=200))
def test_the_service_of_those_who_always_wait_is_proportional_to_their_weights(
    weights: dict[str, float], costs: list[float]
) -> None:
    fairness = Fairness(weights)
    for tenant in sorted(weights):
        fairness.begin(tenant)
    service = dict.fromkeys(weights, 0.0)
    for cost_s in costs:
        tenant = min(sorted(weights), key=fairness.tag_s)
        fairness.served(tenant, cost_s)
        service[tenant] += cost_s
    normalised = [service[tenant] / weights[tenant] for tenant in weights]
    assert max(normalised) - min(normalised) <= max(costs) / min(weights.values()) + 1e-6


def test_a_pause_saves_up_no_more_than_the_credit() -> None:
    fairness = Fairness(credit_s=30.0)
    fairness.begin("busy")
    for _ in range(100):
        fairness.served("busy", 1.0)
    fairness.begin("back")
    assert (fairness.tag_s("back"), fairness.tag_s("busy")) == (70.0 + START_S, 100.0 + START_S)


def test_a_short_pause_saves_up_what_was_left_unused() -> None:
    fairness = Fairness(credit_s=30.0)
    for tenant in ("busy", "brief"):
        fairness.begin(tenant)
    fairness.end("brief")
    fairness.served("busy", 5.0)
    fairness.begin("brief")
    assert fairness.tag_s("busy") - fairness.tag_s("brief") == 5.0


def test_capacity_used_while_nobody_else_wanted_it_is_not_held_against_a_tenant() -> None:
    fairness = Fairness(credit_s=0.0)
    for _ in range(100):
        fairness.served("alone", 1.0)
    fairness.begin("newcomer")
    fairness.begin("alone")
    assert fairness.tag_s("alone") - fairness.tag_s("newcomer") <= 1.0


def test_service_while_others_wait_counts_also_for_one_that_does_not() -> None:
    fairness = Fairness()
    fairness.begin("waits")
    fairness.served("does not", 5.0)
    fairness.begin("does not")
    assert fairness.tag_s("does not") == fairness.tag_s("waits") + 5.0


def test_a_period_of_waiting_that_is_over_leaves_no_debt_behind() -> None:
    fairness = Fairness(credit_s=0.0)
    fairness.begin("a")
    fairness.served("a", 7.0)
    fairness.end("a")
    fairness.begin("b")
    assert fairness.tag_s("b") == 7.0


def test_ever_new_tenants_do_not_come_before_one_that_waits() -> None:
    fairness = Fairness(credit_s=30.0)
    fairness.begin("old")
    for number in range(10):
        fairness.begin(f"new{number}")
        assert fairness.tag_s(f"new{number}") >= fairness.tag_s("old")
        fairness.served(f"new{number}", 50.0)
        fairness.end(f"new{number}")


@given(st.lists(st.tuples(st.integers(0, 40), st.floats(0, 5)), max_size=200))
def test_idle_tenants_are_bounded_and_those_who_wait_are_kept(served: list[tuple[int, float]]) -> None:
    fairness = Fairness(max_idle=5)
    fairness.begin("waits")
    for number, seconds in served:
        fairness.served(f"t{number}", seconds)
        names = [tenant for tenant, _ in fairness.state.tags_s]
        assert "waits" in names
        assert len(names) <= 5 + 1


def test_the_accounts_go_on_elsewhere_as_plain_values() -> None:
    one, other = Fairness({"a": 2.0}), Fairness({"a": 2.0})
    one.begin("a")
    one.served("a", 4.0)
    one.served("b", 3.0)
    other.restore(one.state)
    assert {tenant: other.tag_s(tenant) for tenant in "ab"} == {tenant: one.tag_s(tenant) for tenant in "ab"}


def test_a_tenant_that_waits_while_accounts_are_restored_is_not_lost() -> None:
    fairness = Fairness()
    fairness.begin("here")
    fairness.restore(Fairness().state)
    assert fairness.tag_s("here") == -CREDIT_S
    fairness.end("here")


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_a_weight_is_above_zero_and_finite(weight: float) -> None:
    with pytest.raises(AssertionError):
        Fairness({"a": weight})
