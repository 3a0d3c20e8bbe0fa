"""HTTP routes: gather, decide, act, and say what happened.

One function per kind of route, found in one table. Whatever goes wrong becomes an error body in OpenAI's shape with the
right status; a traceback never leaves the process. Every answer carries the request's id and, once a pair was chosen,
the explain headers.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from secrets import token_hex

import msgspec
import structlog
from aiohttp import web

from adapters.answers import error_body, models_body, refusal
from adapters.base import Retry
from adapters.headers import client_request_id
from adapters.openai import CHAT, COMPLETIONS, parse
from gateway.body import read_body
from gateway.core.admission import refuse_missing_role
from gateway.core.errors import (
    EngineTimeout,
    EngineUnavailable,
    GatewayError,
    MethodNotAllowed,
    NotFound,
)
from gateway.core.events import Progress
from gateway.core.types import Dispatch, Reject, RejectReason, Request
from gateway.dispatch import Dispatcher, Refused, Streamed, StreamEnd, Whole
from gateway.driver import Decided, Driver
from gateway.engine_call import EngineCall
from gateway.gather import Gather, Gathered
from gateway.relay import StreamRelay
from gateway.server import SERVER_NAME

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

REFUSAL_STATUS = {
    RejectReason.NO_PREFILL: 503,
    RejectReason.NO_DECODE: 503,
    RejectReason.UNKNOWN_MODEL: 404,
    RejectReason.PROMPT_TOO_LONG: 400,
    RejectReason.QUEUE_FULL: 429,
    RejectReason.WAITED_TOO_LONG: 429,
    RejectReason.TOO_MANY_ATTEMPTS: 502,
    RejectReason.TTFT_SLO: 429,
    RejectReason.TBT_SLO: 429,
}
REFUSAL_KIND = {400: "invalid_request_error", 404: "not_found_error", 429: "rate_limit_error"}

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
    model: str | None = None
    outcome: str = "error"
    dispatch: Dispatch | None = None

    def headers(self) -> dict[str, str]:
        """Headers of every answer."""
        return {"server": SERVER_NAME, "x-request-id": self.echoed_id}


def explain(exchanged: Exchanged, decided: Decided, dispatch: Dispatch) -> dict[str, str]:
    """The headers that say which pair was chosen, how fast, and what was predicted."""
    estimate = dispatch.estimate
    return exchanged.headers() | {
        "x-sluice-prefill": estimate.prefill,
        "x-sluice-decode": estimate.decode,
        "x-sluice-decision-us": str(round(decided.decision_s * 1e6)),
        "x-sluice-attempts": str(dispatch.attempt),
        "x-sluice-predicted-ttft-ms": f"{estimate.ttft_s * 1e3:.1f}",
        "x-sluice-cached-tokens": str(estimate.cached_tokens),
    }


class Handlers:
    """The routes. Call it with a request."""

    def __init__(
        self, driver: Driver, dispatcher: Dispatcher, gather: Gather, limits: HandlerLimits, *, started_at: float
    ) -> None:
        self._driver = driver
        self._dispatcher = dispatcher
        self._gather = gather
        self._limits = limits
        self._started_at = started_at
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
        exchanged = Exchanged(request_id, echoed_id, self._driver.now())
        response: web.StreamResponse | None = None
        try:
            response = await self._route(request)(request, exchanged)
        except GatewayError as error:
            exchanged.outcome = error.kind
            response = self._failed(request, error.status, refusal(error), exchanged)
            if error.closes_connection:
                response.force_close()
            if isinstance(error, MethodNotAllowed):
                response.headers["allow"] = error.allow
        except (asyncio.CancelledError, ConnectionError):
            exchanged.outcome = "client_left"
            raise
        except Exception:
            log.exception("unexpected failure", request_id=request_id)
            body = error_body("The gateway failed to serve this request.", "internal_error", code=500)
            response = self._failed(request, 500, body, exchanged)
        finally:
            self._log(request, exchanged, response)
        return response

    def _route(self, request: web.BaseRequest) -> Handler:
        entry = self._routes.get(request.path)
        if entry is None:
            raise NotFound(f"There is no {request.path} here.")
        method, handler = entry
        if request.method != method and not (method == "GET" and request.method == "HEAD"):
            raise MethodNotAllowed(f"{request.path} takes {method}, not {request.method}.", allow=method)
        return handler

    # ---- generation -------------------------------------------------------------------------------------------------

    async def generate(self, request: web.BaseRequest, exchanged: Exchanged) -> web.StreamResponse:
        """Gather, decide, act: one request through an engine or a pair of them."""
        raw = await read_body(request, self._limits.max_body_bytes, self._limits.body_timeout_s)
        payload = parse(request.path, raw, list(request.headers.items()), request_id=exchanged.id)
        exchanged.model = payload.model
        gathered = await self._gather(payload, arrived_at=exchanged.began_at)
        streamed: list[web.StreamResponse] = []

        async def stream(call: EngineCall, decided: Decided, dispatch: Dispatch) -> StreamEnd:
            response = web.StreamResponse(status=200, headers=explain(exchanged, decided, dispatch))
            response.content_type = "text/event-stream"
            response.headers["cache-control"] = "no-cache"
            response.headers["x-accel-buffering"] = "no"
            streamed.append(response)
            exchanged.dispatch = dispatch
            relay = StreamRelay(
                request,
                call,
                idle_timeout_s=self._limits.idle_timeout_s,
                write_timeout_s=self._limits.write_timeout_s,
                expects_done=payload.path in (CHAT, COMPLETIONS),
                on_progress=lambda tokens: self._driver.apply(Progress(exchanged.id, tokens)),
            )
            return await relay.run(response)

        ending = await self._dispatcher.serve(gathered.request, gathered.payload, stream)
        self._learn_length(gathered, ending)
        match ending:
            case Refused(decided, reject, failure):
                exchanged.outcome = reject.reason
                return self.refused(reject, failure, exchanged)
            case Whole(decided, dispatch, answer):
                exchanged.outcome, exchanged.dispatch = "served", dispatch
                headers = explain(exchanged, decided, dispatch) | {"content-type": answer.content_type}
                return web.Response(status=answer.status, body=answer.body, headers=headers)
            case Streamed(_, dispatch, end):
                exchanged.outcome, exchanged.dispatch = end.failure or "served", dispatch
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

    def refused(self, reject: Reject, failure: Retry | None, exchanged: Exchanged) -> web.Response:
        """A refusal of the core as an answer. After a failed attempt the failure is what the client should hear of."""
        status = REFUSAL_STATUS[reject.reason]
        headers = exchanged.headers() | {"x-sluice-reason": reject.reason}
        if failure is not None and status in (502, 503):
            error: GatewayError = EngineUnavailable(f"{reject.message}; the last failure was {failure.reason}.")
            if failure.reason.endswith("timeout"):
                error = EngineTimeout(f"{reject.message}; the last failure was {failure.reason}.")
            return self._error(error.status, refusal(error), headers)
        if status in (429, 503):
            headers["retry-after"] = str(math.ceil(reject.retry_after_s or 1.0))
        kind = REFUSAL_KIND.get(status, "service_unavailable_error")
        return self._error(status, error_body(reject.message, kind, code=reject.reason), headers)

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
            "engines": [
                {
                    "id": state.engine.id,
                    "role": state.engine.role,
                    "health": state.health,
                    "reason": state.health_reason,
                    "in_flight": state.in_flight_count,
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

    async def version(self, request: web.BaseRequest, exchanged: Exchanged) -> web.StreamResponse:
        """The version that runs."""
        return self._json(200, msgspec.json.encode({"version": version("sluice")}), exchanged)

    # ---- answers ----------------------------------------------------------------------------------------------------

    def _json(self, status: int, body: bytes, exchanged: Exchanged) -> web.Response:
        exchanged.outcome = "served"
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

    def _log(self, request: web.BaseRequest, exchanged: Exchanged, response: web.StreamResponse | None) -> None:
        if request.path in ("/health", "/ready"):
            return
        estimate = exchanged.dispatch.estimate if exchanged.dispatch else None
        log.info(
            "request",
            request_id=exchanged.id,
            path=request.path,
            model=exchanged.model,
            status=response.status if response is not None else None,
            outcome=exchanged.outcome,
            prefill=estimate.prefill if estimate else None,
            decode=estimate.decode if estimate else None,
            attempts=exchanged.dispatch.attempt if exchanged.dispatch else None,
            duration_s=round(self._driver.now() - exchanged.began_at, 4),
        )
