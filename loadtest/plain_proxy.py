"""The proxy one would write in an afternoon: aiohttp on both sides, round robin, no logic. What benches compare with.

`python -m loadtest.plain_proxy --port 8200 --engine http://127.0.0.1:8101 --engine http://127.0.0.1:8102`
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence

import aiohttp
import uvloop
from aiohttp import web

MAX_BODY_BYTES = 64 * 2**20


def application(engines: Sequence[str]) -> web.Application:
    """Sends each request to the next engine and its answer back as it comes."""
    turns = itertools.cycle(engines)
    session: aiohttp.ClientSession

    async def forward(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        headers = {"content-type": request.headers.get("content-type", "application/json")}
        async with session.request(request.method, next(turns) + request.path, data=body, headers=headers) as answer:
            response = web.StreamResponse(status=answer.status)
            response.content_type = answer.content_type
            await response.prepare(request)
            async for data in answer.content.iter_any():
                await response.write(data)
            await response.write_eof()
            return response

    async def with_session(_: web.Application):  # type: ignore[no-untyped-def]
        nonlocal session
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), auto_decompress=False) as session:
            yield

    app = web.Application(client_max_size=MAX_BODY_BYTES)
    app.cleanup_ctx.append(with_session)
    app.router.add_route("*", "/{path:.*}", forward)
    return app


def main(words: Sequence[str]) -> int:
    """Serves until it is stopped."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.plain_proxy", description="A plain aiohttp proxy.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--engine", metavar="URL", action="append", required=True)
    flags = parser.parse_args(words)
    app = application(flags.engine)
    web.run_app(app, host="127.0.0.1", port=flags.port, loop=uvloop.new_event_loop(), access_log=None, print=None)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
