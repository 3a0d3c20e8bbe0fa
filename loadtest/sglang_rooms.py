"""The bootstrap rooms of emulated SGLang engines: where two legs meet, and how each hears, or does not, of the other.

    prefill leg    waits for the decode leg, computes, hands over, waits until the KV is taken
    decode leg     looks for the bootstrap server, waits for the KV, takes it

What real engines do when one of them is gone is done here after the same times, in engine seconds:

    no bootstrap server at that address       decode fails after 14 s
    the prefill engine died                   decode fails after some 10 s (two missed heart-beats)
    the decode engine died with the KV due    prefill fails after 2 s
    the prefill leg was aborted               decode is told nothing and waits for 300 s
    the decode leg never came                 prefill waits for 300 s
    the decode leg was aborted                prefill fails when it would hand over

Source: engines-on-cpu notes of this project's tests, tests/recorded/sglang-0.5.23 and tests/engines/sglang.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Final

from loadtest.engine_types import HeldKv, RemoteKv
from loadtest.sglang_requests import Room, SglangError

HANDSHAKE_S: Final = 14.0
LOST_PREFILL_S: Final = 10.0
LOST_DECODE_S: Final = 2.1
TIMEOUT_S: Final = 300.0
ABORTED: Final = "Aborted by AbortReq."


@dataclass(slots=True, eq=False)
class Meeting:
    """One room. Each future is set once, or fails with what the other side did."""

    decode_came: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    kv: asyncio.Future[RemoteKv] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """The prompt's KV, at the prefill engine."""
    taken: asyncio.Future[str | None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """None: the decode engine has it; else why it never will."""

    def offer(self, held: HeldKv, engine_id: str, host: str, port: int) -> None:
        """The prompt is computed."""
        if not self.kv.done():
            self.kv.set_result(RemoteKv(held.block_ids, engine_id, held.request_id, host, port))

    def come(self) -> None:
        """The decode leg is here."""
        if not self.decode_came.done():
            self.decode_came.set_result(None)

    def take(self, failure: str | None = None) -> None:
        """The decode leg has the KV, or gave up."""
        if not self.taken.done():
            self.taken.set_result(failure)

    def lose_prefill(self, address: str) -> None:
        """The prefill engine died."""
        if not self.kv.done():
            self.kv.set_exception(ConnectionError(f"Lost connection with prefill instance (bootstrap_addr: {address})"))
            self.kv.exception()  # heard, whether or not a decode leg is there to hear it


class Rooms:
    """The bootstrap server of one prefill engine."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self._meetings: dict[int, Meeting] = {}

    def meeting(self, number: int) -> Meeting:
        """The room of that number, made by whoever comes first."""
        return self._meetings.setdefault(number, Meeting())

    def leave(self, number: int) -> None:
        """The hand-off is over for both: the number may be used again."""
        self._meetings.pop(number, None)

    def close(self) -> None:
        """The prefill engine died."""
        for meeting in self._meetings.values():
            meeting.lose_prefill(f"{self.host}:{self.port}")
        self._meetings.clear()


def failed(what: str, rid: str, room: Room, reason: str) -> SglangError:
    """The words in which an engine tells of a hand-off that failed."""
    request = "decode_req.req" if what.startswith("Decode") else "req"
    message = (
        f"{what} failed for request rank=0 {request}.rid={rid!r} {request}.bootstrap_room={room.number} "
        f"with exception KVTransferError(bootstrap_room={room.number}): {reason}"
    )
    return SglangError(message, kind="500", status=500)
