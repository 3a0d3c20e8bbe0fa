"""HTTP routes: gather, decide, act, and say what happened.

One function per kind of route, found in one table. Whatever goes wrong becomes an error body in OpenAI's shape with the
right status; a traceback never leaves the process. Every answer carries the request's id and, once a pair was chosen,
the explain headers.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from secrets import token_hex

import msgspec
import structlog
from aiohttp import web

from adapters.answers import error_body, models_body, refusal
from adapters.base import Payload, Retry
from adapters.headers import client_request_id
from adapters.openai import CHAT, COMPLETIONS, parse
from gateway.auth import Auth, Tenant
from gateway.body import read_body
from gateway.clients import Clients
from gateway.continuation import Continuation
from gateway.core.admission import refuse_missing_role
from gateway.core.errors import (
    EngineTimeout,
    EngineUnavailable,
    GatewayError,
    MethodNotAllowed,
    NotFound,
)
from gateway.core.events import Progress
from gateway.core.types import Dispatch, Reject, RejectReason, Request, Slo
from gateway.decisions import log_line
from gateway.dispatch import Dispatcher, Refused, Streamed, StreamEnd, Whole
from gateway.driver import Decided, Driver
from gateway.engine_call import EngineCall
from gateway.explain import (
    REFUSAL_KIND,
    REFUSAL_PARAM,
    REFUSAL_STATUS,
    dispatch_headers,
    refusal_headers,
    refusal_members,
)
from gateway.gather import Gather, Gathered
from gateway.insight import Insight
from gateway.records import Outcome, RequestRecord, Trail
from gateway.relay import RelayTotals, StreamRelay
from gateway.server import SERVER_NAME
from gateway.slo import DeadlinePast, Promises
from gateway.tenants import AuthSettings, SloSettings

log = structlog.get_logger("sluice.request")

PASSED_THROUGH = (
    "/v1/responses",
    "/v1/messages",
    "/v1/embeddings",
    "/v1/rerank",
    "/v1/score",
    "/tokenize",
    "/detokenize",
)
"""Routes that one engine serves alone: no hand-off."""

UNLOGGED = ("/health", "/ready")
"""Asked again and again by machines; so is what the gateway tells about itself."""

Handler = Callable[[web.BaseRequest, "Exchanged"], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class HandlerLimits:
    """Bounds on what a client may send, and on how long it or its engine may do nothing."""

    max_body_bytes: int
    body_timeout_s: float
    write_timeout_s: float
    idle_timeout_s: float
    report_stale_s: float = 3.0


@dataclass(slots=True)
class Exchanged:
    """What is known of one HTTP exchange while it runs; its log line is made of it."""

    id: str
    """Ours, and the only one engines see."""
    echoed_id: str
    """The client's own where it gave a sound one."""
    began_at: float
    outcome: Outcome = Outcome.ERROR
    reason: str = ""
    tenant: str | None = None
    slo: Slo = field(default_factory=Slo)
    worker: int | None = None
    """Which of several processes answers; None: there is one."""
    trail: Trail | None = None
    """Of a request for tokens: what is known of it so far."""

    def headers(self) -> dict[str, str]:
        """Headers of every answer."""
        which = {} if self.worker is None else {"x-sluice-worker": str(self.worker)}
        return {"server": SERVER_NAME, "x-request-id": self.echoed_id} | which


def explain(exchanged: Exchanged, decided: Decided, dispatch: Dispatch) -> dict[str, str]:
    """The headers that say which pair was chosen, how fast, and what was predicted."""
    return exchanged.headers() | dispatch_headers(decided, dispatch)


class Handlers:
    """The routes. Call it with a request."""

    def __init__(
        self,
        driver: Driver,
        dispatcher: Dispatcher,
        gather: Gather,
        limits: HandlerLimits,
        *,
        started_at: float,
        auth: Auth | None = None,
        promises: Promises | None = None,
        unix_clock: Callable[[], float] = time.time,
        store_status: Callable[[], Mapping[str, object]] = dict,
        worker: int | None = None,
        relayed: RelayTotals | None = None,
    ) -> None:
        """Without `auth` every request is the tenant `default`'s; without `promises` only headers promise anything.
        `store_status` says how the store stands that this gateway shares with others, `worker` which of
        several processes this is."""
        self._store_status = store_status
        self._worker = worker
        self._driver = driver
        self._dispatcher = dispatcher
        self._gather = gather
        self._limits = limits
        self._auth = auth or Auth(AuthSettings())
        self._clients = Clients()
        self._promises = promises or Promises(SloSettings())
        self._unix_clock = unix_clock
        self._started_at = started_at
        self._relayed = relayed or RelayTotals()
        self.insight: Insight | None = None
        """What the gateway tells about itself; set once all that it tells of exists."""
        self._routes: Mapping[str, tuple[str, Handler]] = {
            CHAT: ("POST", self.generate),
            COMPLETIONS: ("POST", self.generate),
            **{path: ("POST", self.generate) for path in PASSED_THROUGH},
            "/v1/models": ("GET", self.models),
            "/health": ("GET", self.health),
            "/ready": ("GET", self.ready),
            "/version": ("GET", self.version),
        }

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        """Serves one request; every failure becomes an answer, unless the client is gone."""
        request_id = token_hex(16)
        echoed_id = client_request_id(list(request.headers.items())) or request_id
        exchanged = Exchanged(request_id, echoed_id, self._driver.now(), worker=self._worker)
        response: web.StreamResponse | None = None
        try:
            response = await self._route(request)(request, exchanged)
        except GatewayError as error:
            exchanged.outcome = Outcome.BAD_REQUEST if error.status < 500 else Outcome.ERROR
            exchanged.reason = error.kind
            response = self._failed(request, error.status, refusal(error), exchanged)
            if error.closes_connection:
                response.force_close()
            if isinstance(error, MethodNotAllowed):
                response.headers["allow"] = error.allow
        except (asyncio.CancelledError, ConnectionError):
            exchanged.outcome = Outcome.CLIENT_LEFT
            raise
        except Exception:
            log.exception("unexpected failure", request_id=request_id)
            body = error_body("The gateway failed to serve this request.", "internal_error", code=500)
            response = self._failed(request, 500, body, exchanged)
        finally:
            self._over(request, exchanged, response)
        return response

    def _route(self, request: web.BaseRequest) -> Handler:
        entry = self._routes.get(request.path)
        if entry is None and self.insight is not None and self.insight.find(request.path) is not None:
            entry = "GET", self.look
        if entry is None:
            raise NotFound(f"There is no {request.path} here.")
        method, handler = entry
        if request.method != method and not (method == "GET" and request.method == "HEAD"):
            raise MethodNotAllowed(f"{request.path} takes {method}, not {request.method}.", allow=method)
        return handler

    # ---- generation -------------------------------------------------------------------------------------------------

    async def generate(self, request: web.BaseRequest, exchanged: Exchanged) -> web.StreamResponse:
        """Gather, decide, act: one request through an engine or a pair of them."""
        headers, recorder = list(request.headers.items()), self._driver.recorder
        trail = recorder.begin(exchanged.id, exchanged.echoed_id, request.path, headers, now=exchanged.began_at)
        exchanged.trail = trail
        tenant = self._auth.tenant(headers, request.remote)
        exchanged.tenant = trail.tenant = tenant.name
        reject = tenant.refuse_arrival(exchanged.id, now=self._driver.now())
        if reject is not None:
            return self._refused_by_tenant(reject, exchanged)
        with tenant.flight():
            raw = await read_body(request, self._limits.max_body_bytes, self._limits.body_timeout_s)
            payload = parse(request.path, raw, self._auth.passed_on(headers), request_id=exchanged.id)
            trail.model, trail.is_stream = payload.model, payload.is_stream
            trail.prompt = prompt_json(payload) if recorder.keeps_prompts else None
            try:
                promise = self._promises.of(headers, tenant.settings, payload.model, unix_s=self._unix_clock())
            except DeadlinePast as error:
                past = Reject(exchanged.id, RejectReason.DEADLINE_PAST, error.message)
                return self._refused_by_tenant(past, exchanged)
            exchanged.slo = trail.slo = promise.slo
            gathered = await self._gather(
                payload,
                arrived_at=exchanged.began_at,
                promise=promise,
                tenant=tenant.name,
                client=self._clients.number(request.remote),
            )
            trail.gathered(gathered.request, now=self._driver.now())
            reject = tenant.refuse_tokens(exchanged.id, gathered.request.prompt_tokens, now=self._driver.now())
            if reject is not None:
                return self._refused_by_tenant(reject, exchanged)
            return await self._serve(request, exchanged, gathered, tenant)

    async def _serve(
        self, request: web.BaseRequest, exchanged: Exchanged, gathered: Gathered, tenant: Tenant
    ) -> web.StreamResponse:
        """Decide and act."""
        payload = gathered.payload
        streamed: list[web.StreamResponse] = []

        async def stream(
            call: EngineCall, decided: Decided, dispatch: Dispatch, continuation: Continuation | None
        ) -> StreamEnd:
            continues = {"x-sluice-continues": "no" if continuation is None else "yes"}
            response = web.StreamResponse(status=200, headers=explain(exchanged, decided, dispatch) | continues)
            response.content_type = "text/event-stream"
            response.headers["cache-control"] = "no-cache"
            response.headers["x-accel-buffering"] = "no"
            streamed.append(response)
            relay = StreamRelay(
                request,
                call,
                idle_timeout_s=self._limits.idle_timeout_s,
                write_timeout_s=self._limits.write_timeout_s,
                expects_done=payload.path in (CHAT, COMPLETIONS),
                on_progress=lambda tokens: self._driver.apply(Progress(exchanged.id, tokens)),
                continuation=continuation,
                totals=self._relayed,
            )
            return await relay.run(response)

        traced = exchanged.trail if self._driver.recorder.has_traces else None
        ending = await self._dispatcher.serve(gathered.request, payload, stream, traced)
        self._learn_length(gathered, ending)
        tenant.used(output_tokens(ending), now=self._driver.now())
        match ending:
            case Refused(decided, reject, failure):
                exchanged.outcome, exchanged.reason = Outcome.REFUSED, reject.reason
                return self.refused(reject, failure, exchanged, waited_s=decided.waited_s)
            case Whole(decided, dispatch, answer):
                exchanged.outcome, exchanged.reason = whole_outcome(answer.status)
                headers = explain(exchanged, decided, dispatch) | {"content-type": answer.content_type}
                return web.Response(status=answer.status, body=answer.body, headers=headers)
            case Streamed(_, _, end):
                exchanged.outcome = Outcome.BROKEN if end.failure else Outcome.SERVED
                exchanged.reason = end.failure or ""
                return streamed[0]

    def _learn_length(self, gathered: Gathered, ending: Refused | Whole | Streamed) -> None:
        """Tells the estimator of prompt lengths what an engine counted."""
        told = None
        if isinstance(ending, Streamed):
            told = ending.end.prompt_tokens
        elif isinstance(ending, Whole):
            told = ending.usage.prompt_tokens
        if told is not None:
            self._gather.learn(gathered, told)

    def refused(
        self, reject: Reject, failure: Retry | None, exchanged: Exchanged, *, waited_s: float = 0.0
    ) -> web.Response:
        """A refusal of the core as an answer. After a failed attempt the failure is what the client should hear of."""
        status = REFUSAL_STATUS[reject.reason]
        headers = exchanged.headers() | refusal_headers(reject, exchanged.slo, waited_s)
        if failure is not None and status in (502, 503):
            headers = exchanged.headers() | {"x-sluice-reason": reject.reason}
            error: GatewayError = EngineUnavailable(f"{reject.message}; the last failure was {failure.reason}.")
            if failure.reason.endswith("timeout"):
                error = EngineTimeout(f"{reject.message}; the last failure was {failure.reason}.")
            return self._error(error.status, refusal(error), headers)
        kind = REFUSAL_KIND.get(status, "service_unavailable_error")
        numbers = refusal_members(reject, exchanged.slo, waited_s)
        param = REFUSAL_PARAM.get(reject.reason)
        return self._error(status, error_body(reject.message, kind, param, reject.reason, numbers), headers)

    def _refused_by_tenant(self, reject: Reject, exchanged: Exchanged) -> web.Response:
        """A refusal before the core was asked."""
        exchanged.outcome, exchanged.reason = Outcome.REFUSED, reject.reason
        if exchanged.trail is not None:
            exchanged.trail.reject = reject
        self._driver.journal.refused(reject, exchanged.tenant or "", self._driver.now())
        return self.refused(reject, None, exchanged)

    # ---- about the gateway ------------------------------------------------------------------------------------------

    async def models(self, request: web.BaseRequest, exchanged: Exchanged) -> web.StreamResponse:
        """The union of the engines' models."""
        limits: dict[str, int | None] = {}
        for state in self._driver.scheduler.cluster.engines.values():
            for model in state.engine.models:
                known = limits.get(model)
                limits[model] = max(known or 0, state.engine.max_model_tokens or 0) or None
        return self._json(200, models_body(limits, created=int(self._started_at)), exchanged)

    async def health(self, request: web.BaseRequest, exchanged: Exchanged) -> web.StreamResponse:
        """The process lives."""
        return self._json(200, b'{"status":"ok"}', exchanged)

    async def ready(self, request: web.BaseRequest, exchanged: Exchanged) -> web.StreamResponse:
        """Whether some pair can serve, and what every engine is."""
        cluster, prefixes, now = self._driver.scheduler.cluster, self._driver.scheduler.prefixes, self._driver.now()
        probe = Request(id="ready", model="", arrived_at=self._driver.now(), prompt_tokens=1)
        missing = refuse_missing_role(probe, [state.engine for state in cluster.engines.values()], cluster)
        body = {
            "ready": missing is None,
            "reason": None if missing is None else missing.message,
            "stranded_kv": self._dispatcher.stranded.by_connector(now=now),
            "store": self._store_status(),
            **({} if self._worker is None else {"worker": self._worker}),
            "engines": [
                {
                    "id": state.engine.id,
                    "role": state.engine.role,
                    "health": state.health,
                    "reason": state.health_reason,
                    "in_flight": state.in_flight_count,
                    "shared_in_flight": state.own_count,
                    "report_age_s": None if state.reported_at is None else round(now - state.reported_at, 3),
                    "report": self._report_state(state.reported_at, now),
                    "prefixes": prefixes.source(state.engine.id),
                    "prefix_agreement": agreement.ratio if (agreement := prefixes.agreement(state.engine.id)) else None,
                }
                for state in cluster.engines.values()
            ],
        }
        return self._json(200 if missing is None else 503, msgspec.json.encode(body), exchanged)

    def _report_state(self, reported_at: float | None, now: float) -> str:
        """Whether an engine's last report still says how busy it is: fresh, stale, or none at all."""
        if reported_at is None:
            return "none"
        return "stale" if now - reported_at > self._limits.report_stale_s else "fresh"

    async def look(self, request: web.BaseRequest, exchanged: Exchanged) -> web.StreamResponse:
        """What the gateway tells about itself: metrics, decisions, the live page."""
        assert self.insight is not None
        return await self.insight.answer(request, exchanged.headers())

    async def version(self, request: web.BaseRequest, exchanged: Exchanged) -> web.StreamResponse:
        """The version that runs."""
        return self._json(200, msgspec.json.encode({"version": version("sluice")}), exchanged)

    # ---- answers ----------------------------------------------------------------------------------------------------

    def _json(self, status: int, body: bytes, exchanged: Exchanged) -> web.Response:
        exchanged.outcome = Outcome.SERVED
        return web.Response(status=status, body=body, content_type="application/json", headers=exchanged.headers())

    def _failed(self, request: web.BaseRequest, status: int, body: bytes, exchanged: Exchanged) -> web.Response:
        """An error answer. Where another answer is under way already, the connection ends instead: a client must be
        able to tell a broken answer from a whole one."""
        if request.writer.output_size == 0:
            return self._error(status, body, exchanged.headers())
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionError("the answer broke")

    def _error(self, status: int, body: bytes, headers: Mapping[str, str]) -> web.Response:
        return web.Response(status=status, body=body, content_type="application/json", headers=headers)

    def _over(self, request: web.BaseRequest, exchanged: Exchanged, response: web.StreamResponse | None) -> None:
        """The exchange is over: a request for tokens becomes a record, whose observers say the rest."""
        status, now = None if response is None else response.status, self._driver.now()
        if exchanged.trail is not None:
            outcome, reason = exchanged.outcome, exchanged.reason
            self._driver.recorder.finish(exchanged.trail, outcome=outcome, reason=reason, status=status, now=now)
        elif request.path not in UNLOGGED and not (self.insight and self.insight.find(request.path)):
            log.info(
                "request",
                request_id=exchanged.id,
                path=request.path,
                status=status,
                outcome=exchanged.outcome,
                duration_s=round(now - exchanged.began_at, 4),
            )


def log_record(record: RequestRecord) -> None:
    """An observer of records: the request's one line in the log. Nothing is made up for a level that is not logged."""
    if log.is_enabled_for(logging.INFO):
        log.info("request", **log_line(record))


def whole_outcome(status: int) -> tuple[Outcome, str]:
    """How a request ended that an engine answered in one piece, and why."""
    return (Outcome.SERVED, "") if status < 400 else (Outcome.BAD_REQUEST, f"engine_answered_{status}")


def prompt_json(payload: Payload) -> str:
    """The prompt as `gen_ai.input.messages` has it: a list of messages, each a role and its parts."""
    messages = payload.body.get("messages")
    if not isinstance(messages, list):
        messages = [{"role": "user", "content": payload.body.get("prompt", payload.body.get("input"))}]
    sound = [message for message in messages if isinstance(message, dict)]
    told = [{"role": each.get("role"), "parts": [{"type": "text", "content": each.get("content")}]} for each in sound]
    return msgspec.json.encode(told).decode()


def output_tokens(ending: Refused | Whole | Streamed) -> int:
    """Tokens that were made for the request."""
    match ending:
        case Streamed(_, _, end):
            return end.output_tokens
        case Whole(_, _, _, usage):
            return usage.output_tokens or 0
        case _:
            return 0
