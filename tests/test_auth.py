"""Whose request it is: by key, by a trusted proxy's word, or nobody's; and what that tenant may send now."""

from __future__ import annotations

from contextlib import suppress

import pytest

from gateway.auth import Auth, Tenant, Unauthorized, hash_key, presented_key
from gateway.core.errors import BadRequest, ConfigError
from gateway.core.types import Reject, RejectReason
from gateway.tenants import AuthSettings, TenantSettings
from gateway.toml import Secret

PROXY, STRANGER = "10.1.2.3", "192.0.2.1"


def a_tenant(name: str, *keys: str, **fields: object) -> TenantSettings:
    return TenantSettings(name=name, key_hashes=tuple(Secret(hash_key(key).hex()) for key in keys), **fields)


TENANTS = (a_tenant("one", "sk-1", "sk-1b"), a_tenant("two", "sk-2"))


def an_auth(**fields: object) -> Auth:
    settings = {"tenant_header": "X-Tenant", "trusted_networks": ("10.0.0.0/8", "fd00::/8")} | fields
    return Auth(AuthSettings(**settings), TENANTS)


def bearer(key: str) -> tuple[str, str]:
    return "Authorization", f"Bearer {key}"


@pytest.mark.parametrize(
    ("header", "name"),
    [
        (bearer("sk-1"), "one"),
        (bearer("sk-1b"), "one"),
        (("authorization", "bearer  sk-2 "), "two"),
        (("x-api-key", "sk-2"), "two"),
        (bearer("sk-3"), "default"),
        (("Authorization", "Basic c2stMQ=="), "default"),
        (("Authorization", "sk-1"), "default"),
        (bearer(""), "default"),
        (bearer("x" * 5000), "default"),
        (bearer("sk-\udcff"), "default"),
    ],
)
def test_a_key_tells_the_tenant(header: tuple[str, str], name: str) -> None:
    assert an_auth().tenant([header], STRANGER).name == name


def test_two_keys_in_one_request_are_refused() -> None:
    with pytest.raises(BadRequest, match="authorization"):
        an_auth().tenant([bearer("sk-1"), bearer("sk-2")], STRANGER)


@pytest.mark.parametrize("headers", [[], [bearer("sk-3")], [("X-Tenant", "one")]], ids=["none", "unknown", "word"])
def test_who_is_not_known_is_refused_when_a_key_is_required(headers: list[tuple[str, str]]) -> None:
    with pytest.raises(Unauthorized) as caught:
        an_auth(required=True).tenant(headers, STRANGER)
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")
    assert "sk-" not in caught.value.message


@pytest.mark.parametrize("peer", [PROXY, "fd00::1", "fd00::1%eth0"])
def test_a_trusted_proxy_names_the_tenant(peer: str) -> None:
    assert an_auth(required=True).tenant([("x-tenant", "two")], peer).name == "two"


@pytest.mark.parametrize("peer", [STRANGER, None, "nonsense", "2001:db8::1"])
def test_nobody_else_s_word_counts(peer: str | None) -> None:
    assert an_auth().tenant([("x-tenant", "two")], peer).name == "default"


@pytest.mark.parametrize("headers", [[("X-Tenant", "three")], [("X-Tenant", "one"), ("x-tenant", "one")]])
def test_a_tenant_that_is_not_known_or_named_twice_is_refused_by_its_header(headers: list[tuple[str, str]]) -> None:
    with pytest.raises(BadRequest) as caught:
        an_auth().tenant(headers, PROXY)
    assert caught.value.param == "X-Tenant"


def test_a_key_goes_before_a_proxy_s_word() -> None:
    assert an_auth().tenant([bearer("sk-1"), ("X-Tenant", "two")], PROXY).name == "one"


def test_a_key_that_was_meant_for_the_gateway_and_the_tenant_s_name_stay_here() -> None:
    kept = ("traceparent", "00-ab")
    assert an_auth().passed_on([bearer("sk-1"), ("X-TENANT", "one"), kept]) == [kept]
    assert an_auth().passed_on([bearer("engine-key"), kept]) == [bearer("engine-key"), kept]


def test_a_network_that_is_none_is_refused_by_its_path() -> None:
    with pytest.raises(ConfigError, match=r"auth.trusted_networks\[1\]"):
        an_auth(trusted_networks=("10.0.0.0/8", "10.0.0.0/99"))


def test_an_empty_request_presents_no_key() -> None:
    assert presented_key([]) is None


# ---- limits ----------------------------------------------------------------------------------------------------------


def reason(reject: Reject | None) -> RejectReason | None:
    return None if reject is None else reject.reason


def test_requests_over_the_rate_are_refused_until_the_time_that_is_told() -> None:
    tenant = Tenant(a_tenant("t", requests_per_s=2.0, burst_s=0.5))
    assert tenant.refuse_arrival("r1", now=0.0) is None
    refused = tenant.refuse_arrival("r2", now=0.0)
    assert refused is not None
    assert (refused.reason, refused.retry_after_s) == (RejectReason.RATE_LIMITED, 0.5)
    assert tenant.refuse_arrival("r3", now=0.5) is None


def test_tokens_that_were_made_count_as_those_that_were_sent() -> None:
    tenant = Tenant(a_tenant("t", tokens_per_s=100.0, burst_s=1.0))
    assert tenant.refuse_tokens("r1", 50, now=0.0) is None
    tenant.used(150, now=0.0)
    assert reason(tenant.refuse_tokens("r2", 1, now=0.0)) is RejectReason.RATE_LIMITED
    assert tenant.refuse_tokens("r3", 1, now=1.01) is None


def test_requests_in_flight_are_bounded_and_each_place_comes_back() -> None:
    tenant = Tenant(a_tenant("t", max_in_flight=1))
    with suppress(ConnectionError), tenant.flight():
        assert reason(tenant.refuse_arrival("r2", now=0.0)) is RejectReason.TOO_MANY_IN_FLIGHT
        raise ConnectionError
    assert tenant.refuse_arrival("r3", now=0.0) is None


def test_a_tenant_without_limits_has_none() -> None:
    tenant = Tenant(a_tenant("t"))
    tenant.used(10**9, now=0.0)
    assert tenant.refuse_arrival("r", now=0.0) is tenant.refuse_tokens("r", 10**9, now=0.0) is None
