"""Settings of what requests are promised, and of the tenants they come from."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from gateway.toml import Secret

Bound = Annotated[float, Meta(gt=0, le=86_400)]
Priority = Annotated[int, Meta(ge=0, le=9)]
Rate = Annotated[float, Meta(gt=0, le=1e12)]
TenantName = Annotated[
    str, Meta(pattern=r"\A[A-Za-z0-9._:@-]{1,128}\Z", description="1 to 128 letters, digits or any of . _ : @ -")
]
HeaderName = Annotated[
    str, Meta(pattern=r"\A[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}\Z", description="the name of a header, 1 to 64 characters")
]
ModelName = Annotated[str, Meta(min_length=1, max_length=256)]
Network = Annotated[str, Meta(min_length=1, max_length=64)]

ANONYMOUS = "default"
"""The tenant of a request that names none; `[[tenants]]` may give it bounds and limits too."""


class SloSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a request is promised whose headers, tenant and model say nothing else; and the classes of priority."""

    ttft_s: Bound | None = None
    """Seconds from arrival to the first token; not set: no such bound."""
    tbt_s: Bound | None = None
    """Seconds, bound on the mean of the slowest tenth of token gaps; not set: no such bound."""
    tpot_s: Bound | None = None
    """Seconds, bound on the mean token gap; not set: no such bound."""
    deadline_s: Bound | None = None
    """Seconds from arrival to the end of the answer; not set: no such bound."""
    max_priority: Priority = 2
    """Highest class that `x-priority` may ask for, as a count from 0 (the lowest) to 9."""
    default_priority: Priority = 1
    """Class, counted from 0, of a request that does not ask for one."""


class ModelSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What requests for one model are promised where neither their headers nor their tenant say."""

    name: ModelName
    """The model as requests name it, 1 to 256 characters."""
    ttft_s: Bound | None = None
    """Seconds from arrival to the first token; not set: that of `[slo]`."""
    tbt_s: Bound | None = None
    """Seconds, bound on the mean of the slowest tenth of token gaps; not set: that of `[slo]`."""
    tpot_s: Bound | None = None
    """Seconds, bound on the mean token gap; not set: that of `[slo]`."""
    deadline_s: Bound | None = None
    """Seconds from arrival to the end of the answer; not set: that of `[slo]`."""


class TenantSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One tenant: how it is known, what it is promised, what it may ask for."""

    name: TenantName
    """Its name in the journal and in the header of `auth.tenant_header`, at most 128 characters."""
    key_hashes: tuple[Secret, ...] = ()
    """SHA-256 of each of its API keys, 64 hexadecimal characters; `sluice hash-key` prints one."""
    weight: Annotated[float, Meta(ge=0.001, le=1_000)] = 1.0
    """Its share of the engines' seconds beside other tenants, when requests have to wait."""
    ttft_s: Bound | None = None
    """Seconds from arrival to the first token; not set: that of the model or of `[slo]`."""
    tbt_s: Bound | None = None
    """Seconds, bound on the mean of the slowest tenth of token gaps; not set: that of the model or of `[slo]`."""
    tpot_s: Bound | None = None
    """Seconds, bound on the mean token gap; not set: that of the model or of `[slo]`."""
    deadline_s: Bound | None = None
    """Seconds from arrival to the end of the answer; not set: that of the model or of `[slo]`."""
    max_priority: Priority | None = None
    """Highest class it may ask for, as a count from 0; not set: `slo.max_priority`."""
    requests_per_s: Rate | None = None
    """Requests per second; not set: no limit."""
    tokens_per_s: Rate | None = None
    """Prompt and output tokens per second, as a count; not set: no limit."""
    burst_s: Annotated[float, Meta(ge=0.1, le=3_600)] = 10.0
    """Seconds' worth of its rates that it may use at once after a pause."""
    max_in_flight: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    """Requests of it waiting or running at once; not set: no limit."""


class AuthSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Who may send requests, and how a tenant is known besides its API keys."""

    required: bool = False
    """true or false: a request that no tenant is known by is answered 401; false: it is the tenant `default`'s."""
    tenant_header: HeaderName | None = None
    """Header, 1 to 64 characters, in which a proxy names the tenant; not set: none is read."""
    trusted_networks: tuple[Network, ...] = ()
    """Networks, at most 64 characters each (`10.0.0.0/8`), whose proxies are believed in `tenant_header`."""
