"""An OTLP collector for tests: HTTP or gRPC, what comes in is decoded with the official protobufs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span


@dataclass(frozen=True)
class Got:
    """One span as it arrived."""

    span: Span
    resource: dict[str, Any]

    @property
    def name(self) -> str:
        return self.span.name

    @property
    def attributes(self) -> dict[str, Any]:
        return {pair.key: plain(pair.value) for pair in self.span.attributes}


def plain(value: Any) -> Any:
    """A protobuf AnyValue as a Python value."""
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [plain(item) for item in value.array_value.values]
    return getattr(value, kind)


@dataclass
class Receiver:
    """What was received, and how the next batches are answered."""

    url: str = ""
    raw: list[bytes] = field(default_factory=list)
    spans: list[Got] = field(default_factory=list)
    status: int = 200
    """Other than 200: batches are refused with it."""
    is_silent: bool = False
    """Batches are read and never answered."""
    batches: int = 0

    def take(self, request: ExportTraceServiceRequest) -> None:
        self.raw.append(request.SerializeToString())
        for group in request.resource_spans:
            resource = {pair.key: plain(pair.value) for pair in group.resource.attributes}
            self.spans += [Got(span, resource) for scope in group.scope_spans for span in scope.spans]

    def root(self, outcome: str) -> Got | None:
        """The first request's span with that outcome."""
        return next((got for got in self.spans if got.attributes.get("sluice.outcome") == outcome), None)

    def children(self, root: Got) -> list[Got]:
        """The spans under it, in the order in which they were sent."""
        return [got for got in self.spans if got.span.parent_span_id == root.span.span_id]


@asynccontextmanager
async def http_receiver() -> AsyncIterator[Receiver]:
    """A collector that speaks OTLP over HTTP."""
    receiver, over = Receiver(), asyncio.Event()

    async def answer(request: web.BaseRequest) -> web.Response:
        body = await request.read()
        receiver.batches += 1
        if receiver.is_silent:
            await over.wait()
        if receiver.status != 200:
            return web.Response(status=receiver.status)
        assert request.path == "/v1/traces"
        receiver.take(ExportTraceServiceRequest.FromString(body))
        return web.Response(body=ExportTraceServiceResponse().SerializeToString())

    runner = web.ServerRunner(web.Server(answer, handler_cancellation=True), shutdown_timeout=0.0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    receiver.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield receiver
    finally:
        over.set()
        await runner.cleanup()


@contextmanager
def grpc_receiver() -> Iterator[Receiver]:
    """A collector that speaks OTLP over gRPC."""
    receiver = Receiver()

    class Service(TraceServiceServicer):
        def Export(self, request: Any, context: grpc.ServicerContext) -> ExportTraceServiceResponse:
            receiver.batches += 1
            receiver.take(request)
            return ExportTraceServiceResponse()

    server = grpc.server(ThreadPoolExecutor(2))
    add_TraceServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    receiver.url = f"http://127.0.0.1:{port}"
    try:
        yield receiver
    finally:
        server.stop(0).wait()
