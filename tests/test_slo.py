"""What a request is promised: header before tenant before model before settings, and headers that cannot be meant."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.headers import DEADLINE, PRIORITY, PROMISES, TBT, TPOT, TTFT
from gateway.core.errors import BadRequest
from gateway.core.types import Slo
from gateway.slo import MAX_MS, DeadlinePast, Promise, Promises
from gateway.tenants import ModelSettings, SloSettings, TenantSettings

NOW_S = 1_800_000_000.0
NOBODY = TenantSettings(name="nobody")
BOUNDS = (TTFT, TBT, TPOT, DEADLINE)


def promise(
    *headers: tuple[str, str], tenant: TenantSettings | None = NOBODY, model: str | None = None, **settings: float
) -> Promise:
    models = [ModelSettings(name="slow", ttft_s=30.0, tbt_s=0.5)]
    return Promises(SloSettings(**settings), models).of(headers, tenant, model, unix_s=NOW_S)


def test_nothing_is_promised_by_default() -> None:
    assert promise() == Promise(Slo(), priority=1)


def test_every_bound_has_a_header() -> None:
    headers = (TTFT, "100"), (TBT, "20.5"), (TPOT.upper(), "10"), (DEADLINE, " 5000 ")
    assert promise(*headers).slo == Slo(ttft_s=0.1, tbt_s=0.0205, tpot_s=0.01, deadline_s=5.0)


def test_what_a_header_does_not_say_the_tenant_says_then_the_model_then_the_settings() -> None:
    tenant = TenantSettings(name="t", ttft_s=2.0)
    said = promise((TBT, "10"), tenant=tenant, model="slow", ttft_s=9.0, tbt_s=9.0, tpot_s=9.0)
    assert said.slo == Slo(ttft_s=2.0, tbt_s=0.01, tpot_s=9.0)
    assert promise(model="slow", ttft_s=9.0, deadline_s=60.0).slo == Slo(ttft_s=30.0, tbt_s=0.5, deadline_s=60.0)
    assert promise(model="other", tenant=None, ttft_s=9.0).slo == Slo(ttft_s=9.0)


def test_requests_that_ask_for_nothing_get_each_what_its_tenant_and_model_give() -> None:
    promises = Promises(SloSettings(ttft_s=9.0), [ModelSettings(name="slow", ttft_s=30.0)])
    quick, changed = (TenantSettings(name="quick", ttft_s=ttft_s) for ttft_s in (1.0, 2.0))
    asks = [(None, None), (None, "slow"), (None, "other"), (quick, "slow"), (NOBODY, "slow"), (changed, "slow")]
    for _ in range(2):
        got = [promises.of((("accept", "*/*"),), tenant, model, unix_s=NOW_S).slo.ttft_s for tenant, model in asks]
        assert got == [9.0, 30.0, 9.0, 1.0, 30.0, 2.0]
    assert promises.of(((TTFT, "50"),), quick, "slow", unix_s=NOW_S).slo.ttft_s == 0.05


def test_none_takes_a_default_away() -> None:
    assert promise((TTFT, "none"), ttft_s=9.0, tbt_s=0.1).slo == Slo(tbt_s=0.1)


WRONG = [
    "",
    "-1",
    "-0.1",
    "nan",
    "NaN",
    "inf",
    "1e3",
    "1_000",
    "0x10",
    "abc",
    "1,2",
    "1;2",
    "\u0661",
    "86400001",
    "9" * 400,
]


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("text", WRONG, ids=range(len(WRONG)))
def test_a_bound_that_cannot_be_meant_is_refused_by_its_header(name: str, text: str) -> None:
    with pytest.raises(BadRequest) as caught:
        promise((name, text))
    assert (caught.value.param, caught.value.status) == (name, 400)
    assert name in caught.value.message


@pytest.mark.parametrize("name", [TTFT, TBT, TPOT])
def test_a_bound_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(BadRequest, match=name):
        promise((name, "0"))


@pytest.mark.parametrize("name", sorted(PROMISES))
def test_a_header_given_twice_is_refused_even_when_both_say_the_same(name: str) -> None:
    with pytest.raises(BadRequest, match=f"`{name}` is given 2 times"):
        promise((name, "1"), (name.upper(), "1"))


@pytest.mark.parametrize("text", ["", "-1", "3", "1.0", "high", "10", "²"])
def test_a_priority_outside_the_classes_is_refused_with_those_there_are(text: str) -> None:
    with pytest.raises(BadRequest, match="classes 0 to 2") as caught:
        promise((PRIORITY, text))
    assert caught.value.param == PRIORITY


def test_a_tenant_may_ask_up_to_its_own_highest_class() -> None:
    tenant = TenantSettings(name="t", max_priority=0)
    assert promise(tenant=tenant).priority == 0
    assert promise((PRIORITY, "2")).priority == 2
    with pytest.raises(BadRequest, match="classes 0 to 0"):
        promise((PRIORITY, "1"), tenant=tenant)


def test_a_deadline_may_be_the_instant_itself() -> None:
    assert promise((DEADLINE, str(int(NOW_S * 1e3 + 2500)))).slo.deadline_s == pytest.approx(2.5)


@pytest.mark.parametrize("text", ["0", str(int(NOW_S * 1e3)), str(int(NOW_S * 1e3 - 1)), "1000000000000"])
def test_a_deadline_that_has_passed_is_told_apart(text: str) -> None:
    with pytest.raises(DeadlinePast, match=DEADLINE):
        promise((DEADLINE, text))


def test_an_instant_further_away_than_any_bound_may_be_is_refused() -> None:
    with pytest.raises(BadRequest, match="at most"):
        promise((DEADLINE, str(int(NOW_S * 1e3 + MAX_MS + 1))))


@given(st.sampled_from(BOUNDS), st.text(max_size=20))
def test_any_text_is_a_bound_within_a_day_or_a_refusal_that_names_the_header(name: str, text: str) -> None:
    def asked() -> Slo | str | None:
        try:
            return promise((name, text)).slo
        except BadRequest as error:
            return error.param

    said = asked()
    if isinstance(said, Slo):
        bounds = (said.ttft_s, said.tbt_s, said.tpot_s, said.deadline_s)
        assert all(bound_s is None or 0 < bound_s <= MAX_MS / 1e3 for bound_s in bounds)
    else:
        assert said == name
