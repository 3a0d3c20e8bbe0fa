"""The HTTP routes of an emulated vLLM 0.32.0, with the faults that tests switch on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Never, TypeAlias

import msgspec
from aiohttp import web

from gateway.core.errors import BadRequest
from loadtest import tokenizer
from loadtest.engine_types import Finished, FinishReason, Output
from loadtest.vllm_connectors import EngineDies, FakeConnector
from loadtest.vllm_requests import Generation, Limits, VllmError, decoded, invalid_field, parse, remote_kv
from loadtest.vllm_shapes import DONE, VERSION, Choice, Shapes, error_event, models

if TYPE_CHECKING:
    from loadtest.fake_engine import FakeEngine, Stream

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]

MAX_BODY_BYTES = 64 << 20
_GUARDED = ("/v1", "/v2", "/inference", "/cohere")
"""Source: entrypoints/serve/middleware/authenticate.py."""
_NOT_SERVED = {
    "/v1/responses": "The model does not support Responses API",
    "/v1/messages": "The model does not support Messages API",
}


def application(fake: FakeEngine) -> web.Application:
    """The aiohttp application of one engine."""
    routes = _Routes(fake)
    app = web.Application(middlewares=[routes.around], client_max_size=MAX_BODY_BYTES)
    app.router.add_post("/v1/chat/completions", routes.chat)
    app.router.add_post("/v1/completions", routes.completions)
    app.router.add_get("/v1/models", routes.models)
    app.router.add_get("/health", routes.health)
    app.router.add_get("/metrics", routes.metrics)
    app.router.add_get("/version", routes.version)
    if fake.settings.connector == "mooncake":
        app.router.add_get("/query", routes.bootstrap)
    app.router.add_get("/load", routes.load)
    app.router.add_get("/kv_event_sources", routes.kv_event_sources)
    app.router.add_post("/tokenize", routes.tokenize)
    app.router.add_post("/detokenize", routes.detokenize)
    for path in _NOT_SERVED:
        app.router.add_post(path, routes.not_served)
    app.on_response_prepare.append(_name_server)
    return app


async def _name_server(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["Server"] = "uvicorn"


def _json(body: object, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), status=status, content_type="application/json")


def _error(error: VllmError) -> web.Response:
    return _json(error.body(), error.status)


def _server_error(message: str = "Internal server error") -> VllmError:
    return VllmError(message, kind="InternalServerError", status=500)


class _Routes:
    def __init__(self, fake: FakeEngine) -> None:
        self._fake = fake
        self._connector = FakeConnector(fake)
        self._created = int(time.time())
        settings = fake.settings
        self._limits = Limits(settings.model, settings.loras, settings.engine.max_model_tokens)

    # ---- around every route ------------------------------------------------------------------------------------------

    @web.middleware
    async def around(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Faults first, then the key, then errors in vLLM's words."""
        await self._misbehave(request)
        key = self._fake.settings.api_key
        is_guarded = key is not None and request.path.startswith(_GUARDED)
        if is_guarded and request.headers.get("Authorization") != f"Bearer {key}":
            return _json({"error": "Unauthorized"}, 401)
        try:
            response = await handler(request)
        except VllmError as error:
            response = _error(error)
        except web.HTTPException as error:
            response = _json({"detail": error.reason}, error.status)
        except ConnectionError:
            raise asyncio.CancelledError from None  # the client left while it was written to: no error of ours
        if self._fake.settings.has_request_id_headers and not response.prepared:
            response.headers["X-Request-Id"] = request.headers.get("X-Request-Id") or self._random_hex(32)
        return response

    async def _misbehave(self, request: web.Request) -> None:
        faults = self._fake.faults
        if faults.is_silent or (faults.is_silent_to_posts and request.method == "POST"):
            await self._hang()
        if faults.garbage is not None:
            assert request.transport is not None, "the client is still there"
            request.transport.write(faults.garbage)
            request.transport.close()
            await self._hang()

    async def _hang(self) -> Never:
        """Until the connection is lost, which cancels the handler."""
        while True:
            await asyncio.Event().wait()

    async def _hang_up(self, request: web.Request) -> Never:
        """Closes the connection after what was written."""
        if request.transport is not None:
            request.transport.close()
        await self._hang()

    # ---- generation --------------------------------------------------------------------------------------------------

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/chat/completions."""
        return await self._generate(request, is_chat=True)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions."""
        return await self._generate(request, is_chat=False)

    async def _generate(self, request: web.Request, *, is_chat: bool) -> web.StreamResponse:
        body = await self._body(request)
        faults = self._fake.faults
        if faults.errors_left > 0:
            faults.errors_left -= 1
            raise _server_error()
        if self._fake.engine.is_crashed:
            raise _server_error("EngineCore encountered an issue. See stack trace (above) for the root cause.")
        generation = self._parse(body, is_chat=is_chat)
        try:
            self._connector.check(generation.kv_params)
        except EngineDies:
            self._fake.crash()
            raise _server_error() from None
        ids, shapes = self._names(request, generation)
        try:
            if generation.is_stream:
                return await self._answer_stream(request, generation, ids, shapes)
            return await self._answer_whole(request, generation, ids, shapes)
        finally:
            self._fake.abort(ids)

    async def _body(self, request: web.Request) -> bytes:
        if request.content_type != "application/json":
            raise invalid_field("Unsupported Media Type: Only 'application/json' is allowed")
        return await request.read()

    def _parse(self, body: bytes, *, is_chat: bool) -> Generation:
        """The request. When it is refused after its fields were read, the prefill engine may free its blocks."""
        try:
            generation = parse(body, is_chat=is_chat, limits=self._limits)
        except VllmError as error:
            if error.kind != "Bad Request":
                self._release_remote(body)
            raise
        if not self._fake.settings.has_connector or (generation.wants_hold and self._fake.faults.omits_kv_params):
            return replace(generation, kv_params={})
        return generation

    def _release_remote(self, body: bytes) -> None:
        """Source: entrypoints/generate/base/serving.py, _with_kv_transfer_rejection_cleanup."""
        params = msgspec.json.decode(body).get("kv_transfer_params")
        remote = remote_kv(params) if isinstance(params, dict) else None
        if remote is not None and remote.is_complete:
            fabric = self._fake.cluster.fabric
            source = fabric.find(remote.engine_id or "", remote.host or "", remote.port or 0)
            if source is not None:
                source.reader_done(remote.request_id or "", now=self._fake.cluster.now())
                self._fake.cluster.rearm()

    def _names(self, request: web.Request, generation: Generation) -> tuple[list[str], Shapes]:
        base = request.headers.get("X-Request-Id") or generation.body_request_id or self._random_hex(32)
        id = f"{'chatcmpl' if generation.is_chat else 'cmpl'}-{base}"
        ids = []
        for position in range(len(generation.prompts)):
            parent = f"{id if generation.is_chat else f'{id}-{position}'}-{self._random_hex(8)}"
            ids += [f"{n}_{parent}" if generation.choices > 1 else parent for n in range(generation.choices)]
        return ids, Shapes(generation, id, int(time.time()))

    async def _submit(self, generation: Generation, ids: list[str]) -> Stream:
        """Into the engine, as soon as the KV is there that the request waits for."""
        try:
            requests = generation.engine_requests(ids, await self._connector.remote(generation, ids[0]))
        except TimeoutError:
            raise _server_error() from None
        for each in requests:
            self._connector.load(each)
        try:
            return self._fake.submit(requests)
        except BadRequest as error:
            raise VllmError(error.message) from error

    def _random_hex(self, digits: int) -> str:
        return f"{self._fake.cluster.rng.getrandbits(4 * digits):0{digits}x}"

    async def _answer_whole(
        self, request: web.Request, generation: Generation, ids: list[str], shapes: Shapes
    ) -> web.StreamResponse:
        stream = await self._submit(generation, ids)
        choices = _choices(generation)
        ends: dict[int, Finished] = {}
        while not all(choice.is_over for choice in choices):
            output = await stream.outputs.get()
            if output is None:
                await self._hang_up(request)
            self._hear(output, choices, generation, stream)
            if output.end is not None:
                ends[output.choice] = output.end
                if output.end.reason is FinishReason.ERROR:
                    raise _server_error()
        body = shapes.whole(choices, self._kv_params(generation, ends.get(0)), self._cached(generation, ends.get(0)))
        return web.Response(body=body, content_type="application/json", headers=self._load_header(request))

    def _cached(self, generation: Generation, end: Finished | None) -> int | None:
        """Cached prompt tokens for the usage, None unless `--enable-prompt-tokens-details`.

        After a remote prefill they are the prefill engine's. Source: v1/engine/output_processor.py `from_new_request`.
        """
        if end is None or not self._fake.settings.has_prompt_tokens_details:
            return None
        told = generation.kv_params.get("remote_prefill_cached_tokens")
        is_remote = bool(generation.kv_params.get("do_remote_prefill"))
        return told if is_remote and isinstance(told, int) else end.cached_tokens

    def _kv_params(self, generation: Generation, end: Finished | None) -> dict[str, object] | None:
        return None if end is None else self._connector.finished(generation, end)

    async def _answer_stream(
        self, request: web.Request, generation: Generation, ids: list[str], shapes: Shapes
    ) -> web.StreamResponse:
        is_awaited = generation.kv_params.get("do_remote_prefill") and self._connector.name != "nixl"
        stream = None if is_awaited else await self._submit(generation, ids)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        if stream is None:
            try:
                stream = await self._submit(generation, ids)
            except VllmError:
                await response.write(error_event() + DONE)
                return response
        choices = _choices(generation)
        ends: dict[int, Finished] = {}
        is_first = True
        while not all(choice.is_over for choice in choices):
            output = await stream.outputs.get()
            if output is None:
                await self._hang_up(request)
            if is_first:
                is_first = False
                for chunk in shapes.first_chunks():
                    await response.write(chunk)
            if output.end is not None:
                ends[output.choice] = output.end
                if output.end.reason is FinishReason.ERROR:
                    await response.write(error_event() + DONE)
                    return response
            choice = choices[output.choice]
            if not choice.is_over:
                text = self._hear(output, choices, generation, stream)
                await response.write(shapes.chunk(choice, text, output.token_ids))
            if await self._break_stream(request, response, sum(len(c.token_ids) for c in choices)):
                return response
        if generation.includes_usage:
            await response.write(shapes.usage_chunk(choices, self._cached(generation, ends.get(0))))
        await response.write(DONE)
        return response

    async def _break_stream(self, request: web.Request, response: web.StreamResponse, tokens: int) -> bool:
        faults = self._fake.faults
        if faults.drop_after_tokens is not None and tokens >= faults.drop_after_tokens:
            await self._hang_up(request)
        if faults.error_after_tokens is not None and tokens >= faults.error_after_tokens:
            await response.write(error_event() + DONE)
            return True
        return False

    def _hear(self, output: Output, choices: list[Choice], generation: Generation, stream: Stream) -> str:
        """Books one output; a choice that met a stop string needs no more of the engine."""
        choice = choices[output.choice]
        if choice.is_over:
            return ""
        reason = None if output.end is None else output.end.reason.value
        text = choice.hear(output.token_ids, reason, generation.stop)
        if choice.stop_reason is not None and reason is None:
            self._fake.abort([stream.ids[output.choice]])
        return text

    def _load_header(self, request: web.Request) -> dict[str, str]:
        """Source: entrypoints/serve/utils/orca_metrics.py."""
        load = self._fake.engine.load()
        named = {
            "kv_cache_usage_perc": load.kv_usage_ratio,
            "num_requests_waiting": float(load.waiting_count + load.deferred_count),
        }
        match request.headers.get("endpoint-load-metrics-format", "").lower():
            case "json":
                return {"endpoint-load-metrics": f"JSON {msgspec.json.encode({'named_metrics': named}).decode()}"}
            case "text":
                pairs = ", ".join(f"named_metrics.{name}={value}" for name, value in named.items())
                return {"endpoint-load-metrics": f"TEXT {pairs}"}
            case _:
                return {}

    # ---- the rest ----------------------------------------------------------------------------------------------------

    async def models(self, request: web.Request) -> web.Response:
        """GET /v1/models."""
        names = (self._limits.model, *self._limits.loras)
        return _json(models(names, self._fake.engine.settings, self._created))

    async def health(self, request: web.Request) -> web.Response:
        """GET /health."""
        return web.Response(status=503 if self._fake.engine.is_crashed else 200)

    async def metrics(self, request: web.Request) -> web.Response:
        """GET /metrics."""
        content_type = "text/plain; version=1.0.0; charset=utf-8"
        return web.Response(body=self._fake.metrics.render(), headers={"Content-Type": content_type})

    async def bootstrap(self, request: web.Request) -> web.Response:
        """GET /query of Mooncake's bootstrap server, here on the engine's own port."""
        workers = {"0": {"0": f"tcp://{self._fake.settings.host}:{self._fake.port}"}}
        return _json({"0": {"engine_id": self._fake.engine.id, "worker_addr": workers}})

    async def version(self, request: web.Request) -> web.Response:
        """GET /version."""
        return _json({"version": VERSION})

    async def load(self, request: web.Request) -> web.Response:
        """GET /load: 0, as without --enable-server-load-tracking."""
        return _json({"server_load": 0})

    async def kv_event_sources(self, request: web.Request) -> web.Response:
        """GET /kv_event_sources: the resolved config by data-parallel rank, empty without a publisher."""
        publisher = self._fake.publisher
        return _json({} if publisher is None else {"0": publisher.source()})

    async def tokenize(self, request: web.Request) -> web.Response:
        """POST /tokenize, of a prompt or of chat messages."""
        body = decoded(await self._body(request), dict[str, object])
        messages, prompt = body.get("messages"), body.get("prompt")
        if isinstance(messages, list):
            ids = tokenizer.encode_chat(messages)
        elif isinstance(prompt, str):
            ids = tokenizer.encode(prompt)
        else:
            raise invalid_field("prompt: Field required", "prompt")
        strings = [tokenizer.decode([token]) for token in ids] if body.get("return_token_strs") else None
        longest = self._limits.max_model_tokens
        return _json({"count": len(ids), "max_model_len": longest, "tokens": ids, "token_strs": strings})

    async def detokenize(self, request: web.Request) -> web.Response:
        """POST /detokenize."""
        tokens = decoded(await self._body(request), dict[str, object]).get("tokens")
        if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
            raise invalid_field("tokens: Input should be a valid list of integers", "tokens")
        return _json({"prompt": tokenizer.decode(tokens)})

    async def not_served(self, request: web.Request) -> web.Response:
        """Routes of vLLM that this emulator has no model for."""
        raise VllmError(_NOT_SERVED[request.path], kind="NotImplementedError", status=501)


def _choices(generation: Generation) -> list[Choice]:
    prompts = [prompt for prompt in generation.prompts for _ in range(generation.choices)]
    return [Choice(index, prompt) for index, prompt in enumerate(prompts)]
