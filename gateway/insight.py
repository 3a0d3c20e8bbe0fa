"""What the gateway tells about itself over HTTP: `/metrics`, the decisions, the live page; and who may look.

Decisions and the page hold sizes, times and names, no prompt text; still they say what runs here and for whom, so by
default only clients on this machine see them. "On this machine" means a loopback address, asked for by a loopback name
(a page elsewhere cannot make a browser here read them for it), and not passed on by a proxy.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from aiohttp import web

from gateway.config import Access
from gateway.core.errors import BadRequest, GatewayError, NotFound
from gateway.decisions import Filter, explained, listed
from gateway.metrics import CONTENT_TYPE, Metrics
from gateway.records import Recorder

METRICS = "/metrics"
DECISIONS = "/v1/sluice/decisions"
DEFAULT_LIMIT = 100
MAX_LIMIT = 1_000
PROXY_HEADERS = ("forwarded", "x-forwarded-for", "x-real-ip")

Headers = Mapping[str, str]
View = Callable[[web.BaseRequest, Headers], Awaitable[web.StreamResponse]]


class NotForYou(GatewayError):
    """The setting keeps this from clients on other machines."""

    status = 403
    kind = "permission_error"


@dataclass(frozen=True, slots=True)
class InsightAccess:
    """Who may look at what."""

    metrics: Access = Access.ALL
    decisions: Access = Access.LOOPBACK
    dashboard: Access = Access.LOOPBACK


def is_loopback(host: str) -> bool:
    """Whether a `Host` header names this machine: localhost, or a loopback address."""
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    try:
        return name == "localhost" or ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def is_local(request: web.BaseRequest) -> bool:
    """Whether the client is on this machine, and says so."""
    try:
        is_near = request.remote is not None and ipaddress.ip_address(request.remote).is_loopback
    except ValueError:
        return False
    is_passed_on = any(name in request.headers for name in PROXY_HEADERS)
    return is_near and not is_passed_on and is_loopback(request.host)


class Insight:
    """The routes: a path is found here or it is not one of them."""

    def __init__(
        self, recorder: Recorder, metrics: Metrics, access: InsightAccess, page: Mapping[str, View] | None = None
    ) -> None:
        self._recorder = recorder
        self._metrics = metrics
        self._exact: dict[str, tuple[Access, View]] = {
            METRICS: (access.metrics, self.metrics),
            DECISIONS: (access.decisions, self.decisions),
            **{path: (access.dashboard, view) for path, view in (page or {}).items()},
        }
        self._one = (access.decisions, self.decision)

    def find(self, path: str) -> tuple[Access, View] | None:
        """What is at that path; None: nothing of ours, or it is switched off."""
        entry = self._exact.get(path)
        if entry is None and path.startswith(f"{DECISIONS}/"):
            entry = self._one
        return None if entry is None or entry[0] is Access.OFF else entry

    async def answer(self, request: web.BaseRequest, headers: Headers) -> web.StreamResponse:
        """The answer to a path that `find` knows. Raises GatewayError."""
        entry = self.find(request.path)
        if entry is None:
            raise NotFound(f"There is no {request.path} here.")
        access, view = entry
        if access is Access.LOOPBACK and not is_local(request):
            raise NotForYou(f"{request.path} is shown to clients on the gateway's own machine only.")
        return await view(request, headers)

    async def metrics(self, request: web.BaseRequest, headers: Headers) -> web.StreamResponse:
        """Everything for Prometheus."""
        return web.Response(body=self._metrics.render(), headers={**headers, "content-type": CONTENT_TYPE})

    async def decisions(self, request: web.BaseRequest, headers: Headers) -> web.StreamResponse:
        """The last decisions, the youngest first."""
        query = request.query
        wanted = Filter(query.get("outcome"), query.get("model"), query.get("tenant"))
        rows = listed(self._recorder.latest(), wanted, limit=_limit(query.get("limit")))
        return _json({"decisions": rows}, headers)

    async def decision(self, request: web.BaseRequest, headers: Headers) -> web.StreamResponse:
        """One decision with all its candidates."""
        request_id = request.path.removeprefix(f"{DECISIONS}/")
        record = self._recorder.find(request_id)
        if record is None:
            kept = self._recorder.kept_count
            raise NotFound(f"No request {request_id[:128]} among the last {kept} that ended.")
        return _json(explained(record), headers)


def _limit(text: str | None) -> int:
    if text is None:
        return DEFAULT_LIMIT
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:6]) <= MAX_LIMIT:
        raise BadRequest(f"`limit` must be 1 to {MAX_LIMIT}.", param="limit")
    return int(text)


def _json(body: Any, headers: Headers) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), content_type="application/json", headers=headers)
