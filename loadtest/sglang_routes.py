"""The HTTP routes of an emulated SGLang 0.5.23, with the faults that tests switch on."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TYPE_CHECKING, Never, TypeAlias

import msgspec
from aiohttp import web

from gateway.core.types import Role
from loadtest import tokenizer
from loadtest.engine_types import Output
from loadtest.sglang_legs import EngineGone
from loadtest.sglang_requests import Deadly, SglangError, SglangGeneration, parse
from loadtest.sglang_shapes import DONE, Choice, SglangShapes, error_event, loads, models, server_info

if TYPE_CHECKING:
    from loadtest.fake_engine import FakeEngine

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]

MAX_BODY_BYTES = 64 << 20
_OPEN = ("/health", "/ready", "/metrics")
"""Source: utils/auth.py."""


def application(fake: FakeEngine) -> web.Application:
    """The aiohttp application of one engine."""
    routes = _Routes(fake)
    app = web.Application(middlewares=[routes.around], client_max_size=MAX_BODY_BYTES)
    app.router.add_post("/v1/chat/completions", routes.chat)
    app.router.add_post("/v1/completions", routes.completions)
    app.router.add_post("/abort_request", routes.abort_request)
    app.router.add_post("/tokenize", routes.tokenize)
    app.router.add_post("/detokenize", routes.detokenize)
    app.router.add_get("/v1/models", routes.models)
    app.router.add_get("/v1/loads", routes.loads)
    app.router.add_get("/server_info", routes.server_info)
    app.router.add_get("/ready", routes.ready)
    app.router.add_get("/health", routes.ready)
    return app


def _json(body: object, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), status=status, content_type="application/json")


class _Routes:
    def __init__(self, fake: FakeEngine) -> None:
        self._fake = fake
        self._created = int(time.time())

    @web.middleware
    async def around(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Faults first, then the key, then errors in SGLang's words; what kills the scheduler ends the server."""
        await self._misbehave(request)
        key = self._fake.settings.api_key
        if key is not None and not request.path.startswith(_OPEN) and _key_of(request) != f"Bearer {key}":
            return _json({"error": "Unauthorized"}, 401)
        try:
            return await handler(request)
        except SglangError as error:
            return _json(error.body(), error.status)
        except (Deadly, EngineGone):
            await self._fake.die()
            return await self._hang()
        except web.HTTPException as error:
            return _json({"detail": error.reason}, error.status)
        except ConnectionError:
            raise asyncio.CancelledError from None  # the client left while it was written to: no error of ours

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

    # ---- generation --------------------------------------------------------------------------------------------------

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/chat/completions."""
        return await self._generate(request, is_chat=True)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions."""
        return await self._generate(request, is_chat=False)

    async def _generate(self, request: web.Request, *, is_chat: bool) -> web.StreamResponse:
        settings = self._fake.settings
        body = await request.read()
        if self._fake.faults.errors_left > 0:
            self._fake.faults.errors_left -= 1
            raise SglangError("Internal server error", kind="InternalServerError", status=500)
        generation = parse(
            body,
            is_chat=is_chat,
            longest=settings.engine.max_model_tokens,
            is_disaggregated=settings.engine.role is not Role.BOTH,
            rid=f"{self._fake.cluster.rng.getrandbits(128):032x}",
        )
        outputs = self._fake.legs.outputs(generation)
        async with contextlib.aclosing(outputs):
            if generation.is_stream:
                return await self._answer_stream(request, generation, outputs)
            choice, cached = Choice(0, generation.prompt), 0
            async for output in outputs:
                choice.hear(output.token_ids, _reason(output), generation.stop)
                cached = output.end.cached_tokens if output.end else 0
                if choice.is_over:
                    break
            body = SglangShapes(generation, int(time.time())).whole(choice, self._cached(cached))
            return web.Response(body=body, content_type="application/json")

    async def _answer_stream(
        self, request: web.Request, generation: SglangGeneration, outputs: AsyncGenerator[Output, None]
    ) -> web.StreamResponse:
        """The head is sent when the first chunk exists, and an error before that under HTTP 200 all the same."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        shapes, choice = SglangShapes(generation, int(time.time())), Choice(0, generation.prompt)
        cached = 0
        try:
            async for output in outputs:
                if not response.prepared:
                    await response.prepare(request)
                    if generation.is_chat:
                        await response.write(shapes.first_chunk())
                text = choice.hear(output.token_ids, _reason(output), generation.stop)
                cached = output.end.cached_tokens if output.end else 0
                for chunk in shapes.chunks(choice, text):
                    await response.write(chunk)
                if choice.is_over or await self._break_stream(request, response, choice):
                    break
        except SglangError as error:
            if error.status < 500:
                raise
            await response.prepare(request)
            await response.write(error_event(error))
        if generation.includes_usage and choice.is_over:
            await response.write(shapes.usage_chunk(choice, self._cached(cached)))
        await response.write(DONE)
        return response

    async def _break_stream(self, request: web.Request, response: web.StreamResponse, choice: Choice) -> bool:
        faults, tokens = self._fake.faults, len(choice.token_ids)
        if faults.drop_after_tokens is not None and tokens >= faults.drop_after_tokens:
            if request.transport is not None:
                request.transport.close()
            await self._hang()
        if faults.error_after_tokens is not None and tokens >= faults.error_after_tokens:
            await response.write(error_event(SglangError("Internal server error", status=500)))
            return True
        return False

    def _cached(self, tokens: int) -> int:
        """Cached prompt tokens as `usage` tells them. A decode engine tells the prefill engine's, which are not known
        to this model of it: none."""
        return 0 if self._fake.settings.engine.role is Role.DECODE else tokens

    # ---- the rest ----------------------------------------------------------------------------------------------------

    async def abort_request(self, request: web.Request) -> web.Response:
        """POST /abort_request: always 200; an unknown id is ignored."""
        rid = msgspec.json.decode(await request.read()).get("rid")
        if isinstance(rid, str):
            self._fake.legs.abort(rid)
        return web.Response()

    async def models(self, request: web.Request) -> web.Response:
        """GET /v1/models."""
        settings = self._fake.settings
        return _json(models(settings.model, settings.engine.max_model_tokens, self._created))

    async def loads(self, request: web.Request) -> web.Response:
        """GET /v1/loads."""
        return _json(loads(self._fake.engine, self._fake.legs.waiting, time.time()))

    async def server_info(self, request: web.Request) -> web.Response:
        """GET /server_info."""
        fake = self._fake
        port = fake.bootstrap_port if fake.settings.engine.role is Role.PREFILL else 8998
        return _json(server_info(fake.engine, fake.settings.model, port, self._kv_events()))

    def _kv_events(self) -> dict[str, object] | None:
        publisher = self._fake.publisher
        if publisher is None:
            return None
        port = int(publisher.settings.endpoint.rpartition(":")[2])
        replay = publisher.settings.replay_endpoint
        return {
            "publisher": "zmq",
            "endpoint_host": self._fake.settings.host,
            "endpoint_port_base": port,
            "topic": publisher.settings.topic,
            "block_size": self._fake.engine.settings.block_tokens,
            "dp_size": 1,
            "replay_endpoint_port_base": int(replay.rpartition(":")[2]) if replay else None,
        }

    async def ready(self, request: web.Request) -> web.Response:
        """GET /ready."""
        return web.Response(status=503 if self._fake.engine.is_crashed else 200)

    async def tokenize(self, request: web.Request) -> web.Response:
        """POST /tokenize, of a prompt or of chat messages."""
        body = msgspec.json.decode(await request.read(), type=dict[str, object])
        messages, prompt = body.get("messages"), body.get("prompt")
        ids = tokenizer.encode_chat(messages) if isinstance(messages, list) else tokenizer.encode(str(prompt))
        longest = self._fake.settings.engine.max_model_tokens
        return _json({"tokens": ids, "count": len(ids), "max_model_len": longest})

    async def detokenize(self, request: web.Request) -> web.Response:
        """POST /detokenize."""
        tokens = msgspec.json.decode(await request.read(), type=dict[str, object])["tokens"]
        return _json({"text": tokenizer.decode(msgspec.convert(tokens, list[int]))})


def _key_of(request: web.Request) -> str | None:
    return request.headers.get("Authorization")


def _reason(output: Output) -> str | None:
    return None if output.end is None else output.end.reason.value
