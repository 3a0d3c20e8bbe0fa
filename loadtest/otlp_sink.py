"""A collector for benches: takes OTLP over HTTP, keeps nothing, answers as a collector does.

python -m loadtest.otlp_sink     prints {"port": N} when it listens on loopback, and ends with its standard input
"""

from __future__ import annotations

import asyncio
import json
import sys

from aiohttp import web


async def take(request: web.BaseRequest) -> web.Response:
    """Reads a batch; an empty ExportTraceServiceResponse has no bytes."""
    await request.read()
    return web.Response(body=b"", content_type="application/x-protobuf")


async def serve() -> None:
    """Takes batches until the standard input ends."""
    runner = web.ServerRunner(web.Server(take))
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        print(json.dumps({"port": runner.addresses[0][1]}), flush=True)
        await asyncio.to_thread(sys.stdin.read)
    finally:
        await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(serve())
