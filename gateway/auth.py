"""Whose request it is, and whether that tenant may send it now.

A tenant is known by an API key (`Authorization: Bearer KEY`, or `x-api-key`), of which the settings hold only the
SHA-256, or by the header of a proxy in a trusted network. A presented key is compared with every known one in constant
time; it is never logged, and one that the gateway recognised is not passed on to engines.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

from gateway.core.errors import BadRequest, ConfigError, GatewayError
from gateway.core.types import Reject, RejectReason
from gateway.rates import Bucket
from gateway.slo import single
from gateway.tenants import ANONYMOUS, AuthSettings, TenantSettings

AUTHORIZATION, API_KEY = "authorization", "x-api-key"
MAX_KEY_CHARACTERS = 4_096


class Unauthorized(GatewayError):
    """No tenant is known by what the request carries."""

    status = 401
    kind = "invalid_request_error"
    code = "invalid_api_key"


class Tenant:
    """One tenant while the gateway runs: what it has in flight and what is left of its rates."""

    def __init__(self, settings: TenantSettings) -> None:
        self.settings = settings
        self.in_flight_count = 0
        self._requests = _bucket(settings.requests_per_s, settings.burst_s)
        self._tokens = _bucket(settings.tokens_per_s, settings.burst_s)

    @property
    def name(self) -> str:
        return self.settings.name

    def refuse_arrival(self, request_id: str, *, now: float) -> Reject | None:
        """A refusal when it sends too often or has too much in flight; else the request is counted."""
        limit = self.settings.max_in_flight
        if limit is not None and self.in_flight_count >= limit:
            message = f"{self.in_flight_count} requests of tenant {self.name} are in flight; at most {limit} may be"
            return Reject(request_id, RejectReason.TOO_MANY_IN_FLIGHT, message)
        return self._take(self._requests, 1, request_id, "requests", now)

    def refuse_tokens(self, request_id: str, tokens: int, *, now: float) -> Reject | None:
        """A refusal when that many prompt tokens are over its rate; else they are counted."""
        return self._take(self._tokens, tokens, request_id, "tokens", now)

    def used(self, output_tokens: int, *, now: float) -> None:
        """So many output tokens were made for it."""
        if self._tokens is not None:
            self._tokens.take(output_tokens, now=now)

    @contextmanager
    def flight(self) -> Iterator[None]:
        """One request of it is in flight inside this block."""
        self.in_flight_count += 1
        try:
            yield
        finally:
            self.in_flight_count -= 1

    def _take(self, bucket: Bucket | None, cost: int, request_id: str, what: str, now: float) -> Reject | None:
        if bucket is None:
            return None
        wait_s = bucket.wait_s(cost, now=now)
        if wait_s == 0:
            bucket.take(cost, now=now)
            return None
        message = f"tenant {self.name} is over its rate of {what}"
        return Reject(request_id, RejectReason.RATE_LIMITED, message, retry_after_s=wait_s)


class Auth:
    """All tenants, and how a request is told to be of one."""

    def __init__(self, settings: AuthSettings, tenants: Sequence[TenantSettings] = ()) -> None:
        """Raises ConfigError when a trusted network is none."""
        self._settings = settings
        self._tenants = {tenant.name: Tenant(tenant) for tenant in tenants}
        self._anonymous = self._tenants.get(ANONYMOUS) or Tenant(TenantSettings(name=ANONYMOUS))
        self._keys = [
            (bytes.fromhex(key_hash.reveal()), self._tenants[tenant.name])
            for tenant in tenants
            for key_hash in tenant.key_hashes
        ]
        self._networks = [_network(text, row) for row, text in enumerate(settings.trusted_networks)]

    def tenant(self, headers: Sequence[tuple[str, str]], peer: str | None) -> Tenant:
        """Whose request it is. `peer` is the address it came from. Raises Unauthorized, or BadRequest for a tenant
        header that names nobody."""
        key = presented_key(headers)
        if key is not None and (tenant := self._by_key(key)) is not None:
            return tenant
        named = self._by_header(headers, peer)
        if named is not None:
            return named
        if self._settings.required:
            raise Unauthorized("An API key is missing." if key is None else "The API key is not known.")
        return self._anonymous

    def passed_on(self, headers: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """The headers without the tenant's name, and without a key that was meant for the gateway."""
        key = presented_key(headers)
        dropped = {self._settings.tenant_header.lower()} if self._settings.tenant_header else set()
        if key is not None and self._by_key(key) is not None:
            dropped |= {AUTHORIZATION, API_KEY}
        return [(name, value) for name, value in headers if name.lower() not in dropped]

    def _by_key(self, key: str) -> Tenant | None:
        digest = hash_key(key)
        found = None
        for known, tenant in self._keys:  # to the end in any case: how long it takes says nothing
            if hmac.compare_digest(known, digest):
                found = tenant
        return found

    def _by_header(self, headers: Sequence[tuple[str, str]], peer: str | None) -> Tenant | None:
        header = self._settings.tenant_header
        if header is None or peer is None or not self._is_trusted(peer):
            return None
        name = single(headers, header)
        if name is None:
            return None
        if name != ANONYMOUS and name not in self._tenants:
            raise BadRequest(f"`{header}` names a tenant that is not known.", param=header)
        return self._tenants.get(name, self._anonymous)

    def _is_trusted(self, peer: str) -> bool:
        try:
            address = ip_address(peer.partition("%")[0])
        except ValueError:
            return False
        return any(address in network for network in self._networks)


def presented_key(headers: Sequence[tuple[str, str]]) -> str | None:
    """The API key in the request; None without one. Raises BadRequest when there are several."""
    scheme, _, credentials = (single(headers, AUTHORIZATION) or "").partition(" ")
    key = credentials.strip() if scheme.lower() == "bearer" else single(headers, API_KEY)
    return key if key and len(key) <= MAX_KEY_CHARACTERS else None


def hash_key(key: str) -> bytes:
    """The SHA-256 of an API key, 32 bytes. Keys are long and random, so they need no slow hash."""
    return sha256(key.encode("utf-8", "surrogateescape")).digest()


def _bucket(rate_per_s: float | None, burst_s: float) -> Bucket | None:
    return None if rate_per_s is None else Bucket(rate_per_s, burst_s=burst_s)


def _network(text: str, row: int) -> IPv4Network | IPv6Network:
    try:
        return ip_network(text, strict=False)
    except ValueError as error:
        raise ConfigError(f"auth.trusted_networks[{row}]: {error}") from None
