"""What a request is promised: the bounds and the class that its headers, tenant, model and the settings give it. Pure.

Bounds are milliseconds in headers, each on its own: what a header does not say the tenant says, then the model, then
`[slo]`. The word `none` takes a default away. A deadline is a time from arrival, or (from UNIX_MS on) the Unix time at
which it passes; that is turned into a time from arrival once, when the request arrives, so a step of the wall clock
afterwards changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from adapters.headers import DEADLINE, PRIORITY, PROMISES, TBT, TPOT, TTFT
from gateway.core.errors import BadRequest
from gateway.core.types import RejectReason, Slo
from gateway.tenants import ModelSettings, SloSettings, TenantSettings

MAX_MS: Final = 86_400_000.0
"""A day: the longest bound that settings take, too."""
UNIX_MS: Final = 1e12
"""September 2001. No bound is as long, so a deadline from here on is an instant."""
_NUMBER: Final = re.compile(r"[0-9]{1,16}(\.[0-9]{1,9})?")


class DeadlinePast(BadRequest):
    """The deadline that the request names has passed already."""

    code = RejectReason.DEADLINE_PAST


class Bounds(Protocol):
    """What can promise something: the settings of all, of a model, of a tenant."""

    @property
    def ttft_s(self) -> float | None: ...

    @property
    def tbt_s(self) -> float | None: ...

    @property
    def tpot_s(self) -> float | None: ...

    @property
    def deadline_s(self) -> float | None: ...


@dataclass(frozen=True, slots=True)
class Promise:
    """What the core is told of a request."""

    slo: Slo
    priority: int


class Promises:
    """What each request is promised."""

    def __init__(self, slo: SloSettings, models: Sequence[ModelSettings] = ()) -> None:
        self._slo = slo
        self._models = {model.name: model for model in models}
        self._by_settings: dict[tuple[str | None, str | None], tuple[TenantSettings | None, Promise]] = {}
        """What a tenant gets for a model when it asks for nothing; at most one for each two that settings name."""

    def of(
        self, headers: Sequence[tuple[str, str]], tenant: TenantSettings | None, model: str | None, *, unix_s: float
    ) -> Promise:
        """The promise for a request with these headers that arrives now, at the Unix time `unix_s`.

        Raises BadRequest, the header in `param`, for what cannot be meant, and DeadlinePast.
        """
        if all(name.lower() not in PROMISES for name, _ in headers):
            return self._unasked(tenant, model if model in self._models else None, unix_s)
        return self._asked(headers, tenant, model, unix_s)

    def _unasked(self, tenant: TenantSettings | None, model: str | None, unix_s: float) -> Promise:
        key = tenant.name if tenant is not None else None, model
        known = self._by_settings.get(key)
        if known is None or known[0] is not tenant:
            known = self._by_settings[key] = tenant, self._asked((), tenant, model, unix_s)
        return known[1]

    def _asked(
        self, headers: Sequence[tuple[str, str]], tenant: TenantSettings | None, model: str | None, unix_s: float
    ) -> Promise:
        defaults = [who for who in (tenant, self._models.get(model or ""), self._slo) if who is not None]
        return Promise(
            Slo(
                ttft_s=_bound_s(headers, TTFT, [who.ttft_s for who in defaults]),
                tbt_s=_bound_s(headers, TBT, [who.tbt_s for who in defaults]),
                tpot_s=_bound_s(headers, TPOT, [who.tpot_s for who in defaults]),
                deadline_s=_bound_s(headers, DEADLINE, [who.deadline_s for who in defaults], unix_s=unix_s),
            ),
            self._priority(headers, tenant),
        )

    def _priority(self, headers: Sequence[tuple[str, str]], tenant: TenantSettings | None) -> int:
        own = tenant.max_priority if tenant is not None else None
        highest = self._slo.max_priority if own is None else min(own, self._slo.max_priority)
        text = single(headers, PRIORITY)
        if text is None:
            return min(self._slo.default_priority, highest)
        if not re.fullmatch(r"[0-9]", text) or int(text) > highest:
            raise BadRequest(f"`{PRIORITY}` must be one of the classes 0 to {highest}.", param=PRIORITY)
        return int(text)


def single(headers: Sequence[tuple[str, str]], name: str) -> str | None:
    """The value of a header that may stand once; None when it is not there. Raises BadRequest when it is repeated."""
    wanted = name.lower()
    values = [value for key, value in headers if key.lower() == wanted]
    if len(values) > 1:
        raise BadRequest(f"`{name}` is given {len(values)} times.", param=name)
    return values[0].strip() if values else None


def _bound_s(
    headers: Sequence[tuple[str, str]], name: str, defaults_s: Sequence[float | None], *, unix_s: float | None = None
) -> float | None:
    """The bound in seconds: the header's, else the first default that is set."""
    text = single(headers, name)
    if text is None:
        return next((bound_s for bound_s in defaults_s if bound_s is not None), None)
    if text == "none":
        return None
    value_ms = float(text) if _NUMBER.fullmatch(text) else -1.0
    if unix_s is not None and value_ms >= UNIX_MS:
        value_ms = value_ms - unix_s * 1e3
        if value_ms <= 0:
            raise DeadlinePast(f"`{name}` passed {-value_ms:.0f} ms ago by this gateway's clock.", param=name)
    elif unix_s is not None and value_ms == 0:
        raise DeadlinePast(f"`{name}` is 0: nothing can be answered by then.", param=name)
    if not 0 < value_ms <= MAX_MS:
        raise BadRequest(f"`{name}` must be `none` or milliseconds above 0, at most {MAX_MS:.0f}.", param=name)
    return value_ms / 1e3
