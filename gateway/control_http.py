"""Control traffic to engines over aiohttp's client: small bounded answers, no redirects."""

from __future__ import annotations

import aiohttp

from gateway.core.errors import MalformedEngineData

IDLE_S = 2.5
"""Idle connections are kept for less than engines keep theirs (vLLM: 5 s)."""


def bearer(api_key: str | None) -> dict[str, str]:
    """The header that carries an engine's key; nothing without one."""
    return {"authorization": f"Bearer {api_key}"} if api_key else {}


async def read_bounded(response: aiohttp.ClientResponse, limit_bytes: int) -> bytes:
    """The whole body. Raises MalformedEngineData when it is longer than the limit."""
    pieces: list[bytes] = []
    size = 0
    async for piece in response.content.iter_any():
        size += len(piece)
        if size > limit_bytes:
            raise MalformedEngineData(f"{response.url} answered with more than {limit_bytes} bytes")
        pieces.append(piece)
    return b"".join(pieces)
