"""Policies: which feasible pair. Pure plug-ins; to add one: one file, one line in the table, one test file."""

from __future__ import annotations

from gateway.core.interfaces import Policy
from gateway.policies.least_work import LeastWork

POLICIES: dict[str, type[Policy]] = {
    "least_work": LeastWork,
}
