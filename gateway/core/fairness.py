"""Weighted fair shares between tenants: of those who wait, the one who was served least for its weight comes next.

Each tenant has a tag: the seconds of service it had, divided by its weight. Serving whoever has the lowest tag makes
the service of tenants that always wait proportional to their weights, whatever each of them sends. A tenant that comes
back after a pause starts where those stand who wait, less a credit: what it left unused is saved up for it, but no more
than that. So one whose requests come at random, at its share on average, is not held to its share at every instant;
and capacity used while nobody else wanted it is not held against anyone.

The method is start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996), with service counted when it is known
instead of when a request begins, and with the credit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

DEFAULT_WEIGHT = 1.0
CREDIT_S = 60.0
"""Seconds of service for a weight of 1 that a tenant can save up. Beside one that sends ten times its own, a tenant at
its share keeps .901 of its goodput with none, .946 with 20 s, .957 with 60 s and .960 with 100 s.
Source: the mean of seeds 0 to 2 of `sluice bench tenants --admission ttft`."""
MAX_IDLE_TENANTS = 1_024
"""Tenants remembered of whom nobody waits. A forgotten one is forgiven what it had above the others."""


@dataclass(frozen=True, slots=True)
class FairnessState:
    """Every account as plain values."""

    virtual_s: float
    """Where those stand who wait, seconds of service for a weight of 1; it never falls."""
    tags_s: tuple[tuple[str, float], ...]
    """(tenant, seconds of service divided by its weight), sorted by tenant."""


class Fairness:
    """The accounts of all tenants. At most `max_idle` of those that do not wait are remembered."""

    def __init__(
        self,
        weights: Mapping[str, float] | None = None,
        *,
        credit_s: float = CREDIT_S,
        max_idle: int = MAX_IDLE_TENANTS,
    ) -> None:
        """`weights` > 0 by tenant; a tenant without one has DEFAULT_WEIGHT."""
        self._weights = dict(weights or {})
        assert all(0 < weight < inf for weight in self._weights.values()), "weights are above 0 and finite"
        self._credit_s = credit_s
        self._max_idle = max_idle
        self._virtual_s = 0.0
        self._tags_s: dict[str, float] = {}
        self._waiting: set[str] = set()

    def weight(self, tenant: str) -> float:
        """The tenant's share relative to others'."""
        return self._weights.get(tenant, DEFAULT_WEIGHT)

    def tag_s(self, tenant: str) -> float:
        """Seconds of service the tenant counts as having had, divided by its weight; the lowest is next."""
        tag_s = self._tags_s.get(tenant, -inf)
        return tag_s if tenant in self._waiting else max(tag_s, self._virtual_s - self._credit_s)

    def begin(self, tenant: str) -> None:
        """The first request of the tenant begins to wait."""
        self._tags_s[tenant] = self.tag_s(tenant)
        self._waiting.add(tenant)

    def end(self, tenant: str) -> None:
        """No request of the tenant waits any more."""
        self._waiting.discard(tenant)
        self._advance(self._tags_s[tenant])
        self._forget()

    def served(self, tenant: str, seconds: float) -> None:
        """The tenant had that much service, seconds >= 0, whether or not its request waited."""
        start_s = self.tag_s(tenant)
        self._tags_s[tenant] = start_s + seconds / self.weight(tenant)
        self._advance(start_s)
        self._forget()

    @property
    def state(self) -> FairnessState:
        """The accounts now."""
        return FairnessState(self._virtual_s, tuple(sorted(self._tags_s.items())))

    def restore(self, state: FairnessState) -> None:
        """Goes on from those accounts. Tenants that wait keep what they had where the state does not name them."""
        self._virtual_s = state.virtual_s
        kept = {tenant: self._tags_s[tenant] for tenant in sorted(self._waiting)}
        self._tags_s = kept | dict(state.tags_s)
        self._forget()

    def _advance(self, alone_s: float) -> None:
        """Moves on to where those stand who wait; while nobody does, to `alone_s`, where the last one stood."""
        self._virtual_s = max(self._virtual_s, min((self._tags_s[name] for name in self._waiting), default=alone_s))

    def _forget(self) -> None:
        """Keeps the bound: first those go whose accounts say nothing, then those that owe least."""
        if len(self._tags_s) - len(self._waiting) <= self._max_idle:
            return
        floor_s = self._virtual_s - self._credit_s
        idle = sorted((tag_s, tenant) for tenant, tag_s in self._tags_s.items() if tenant not in self._waiting)
        surplus = len(idle) - self._max_idle
        for position, (tag_s, tenant) in enumerate(idle):
            if position >= surplus and tag_s > floor_s:
                break
            del self._tags_s[tenant]
