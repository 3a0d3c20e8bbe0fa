"""Reads a request body within its bounds: size, and time without progress."""

from __future__ import annotations

import asyncio

from aiohttp import HttpVersion11, web

from gateway.core.errors import BadRequest, BodyTooLarge, RequestTimeout

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


async def read_body(request: web.BaseRequest, limit_bytes: int, timeout_s: float) -> bytes:
    """The whole body. Raises BodyTooLarge as soon as that is known, RequestTimeout when the client stalls.

    A body that announces its length is refused before a byte of it is read; one that does not, at the limit.
    """
    announced_bytes = request.content_length
    if announced_bytes is not None and announced_bytes > limit_bytes:
        raise BodyTooLarge(f"The request body has {announced_bytes} bytes; at most {limit_bytes} are taken.")
    is_asked = request.version >= HttpVersion11 and request.headers.get("expect", "").lower() == "100-continue"
    if is_asked and request.transport is not None:
        request.transport.write(CONTINUE)
    if request.content.is_eof() and request.content.exception() is None and announced_bytes is not None:
        return request.content.read_nowait()  # it came with its head, as small bodies do: no timer, no wait
    pieces: list[bytes] = []
    size = 0
    try:
        while not request.content.at_eof():
            async with asyncio.timeout(timeout_s):
                piece = await request.content.readany()
            size += len(piece)
            if size > limit_bytes:
                raise BodyTooLarge(f"The request body has more than the {limit_bytes} bytes that are taken.")
            pieces.append(piece)
    except TimeoutError:
        raise RequestTimeout(f"The request body stalled for {timeout_s:g} s.") from None
    except web.RequestPayloadError as error:
        raise BadRequest(f"The request body could not be read: {error}.") from None
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
