"""What gateways tell each other, as bytes: batches of small events, compact and versioned. Pure.

A message is one byte of version and a MessagePack array `[member, epoch, sequence, lease_ms, age_us, [event, ...]]`;
an event is an array whose first item says its kind. Request ids, texts and keys never leave a gateway: a reservation is
a number within its owner's epoch, so that what follows a dispatch costs a few bytes. Times are whole microseconds, ages
count back from the message, and block hashes are their raw bytes.

Messages may come from another release or from somebody else altogether: whatever is not sound is `MalformedMessage`, a
version that is not ours `UnknownVersion`, and neither changes anything. Items that a later release adds at the end of
an event are ignored.
"""

from __future__ import annotations

import zlib
from typing import Annotated, TypeAlias

import msgspec
import numpy as np
from msgspec import Meta, Struct

from gateway.core.errors import GatewayError
from gateway.core.events import FeedState, Tier
from gateway.core.types import BlockHashes

VERSION = 1
MAX_MESSAGE_BYTES = 2**20
"""Senders cut at half of it; beyond it nobody even decodes."""
HASH_BYTES = 8

Whole = Annotated[int, Meta(ge=0, le=2**53)]
Count = Annotated[int, Meta(ge=0, le=2**31)]
Name = Annotated[str, Meta(min_length=1, max_length=512)]
Hashes = Annotated[bytes, Meta(max_length=MAX_MESSAGE_BYTES)]


class MalformedMessage(GatewayError):
    """Bytes in the store that are no message of a gateway."""


class UnknownVersion(MalformedMessage):
    """A message of a gateway of another release."""


class Sent(Struct, array_like=True, frozen=True, tag=1):
    """The member dispatched a request: its reservation begins."""

    number: Whole
    age_us: Whole
    prefill: Name
    decode: Name
    prompt_tokens: Annotated[int, Meta(ge=1, le=2**31)]
    cached_tokens: Count
    wait_us: Whole
    fetch_us: Whole
    prefill_us: Whole
    hand_off_us: Whole
    join_us: Whole
    tbt_us: Whole
    max_output_tokens: Count | None = None
    fetch_from: Name | None = None
    fetched_tokens: Count = 0
    model: Annotated[str, Meta(max_length=512)] = ""
    tenant: Annotated[str, Meta(max_length=512)] = ""
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31)] = 0
    block_tokens: Count = 0
    """0: nothing is known of its blocks."""
    first_block: Count = 0
    hashes: Hashes = b""
    stall_us: Whole = 0


class Prefilled(Struct, array_like=True, frozen=True, tag=2):
    """Its prefill is done."""

    number: Whole


class Producing(Struct, array_like=True, frozen=True, tag=3):
    """It has that many output tokens."""

    number: Whole
    output_tokens: Count


class Ended(Struct, array_like=True, frozen=True, tag=4):
    """Its reservation is over."""

    number: Whole
    is_finished: bool


class Held(Struct, array_like=True, frozen=True, tag=5):
    """All reservations of the member, ascending: each as its distance from the one before."""

    steps: tuple[Whole, ...]


class Gone(Struct, array_like=True, frozen=True, tag=6):
    """The member stops: it holds nothing more."""


class Ask(Struct, array_like=True, frozen=True, tag=7):
    """The member wants to hear again all that another one (or, empty, everybody) holds; or the blocks it listens to."""

    member: Annotated[str, Meta(max_length=512)]
    wants_blocks: bool = False


class Stored(Struct, array_like=True, frozen=True, tag=8):
    """The engine announced to the member, who listens to it under this fencing token, that it holds these blocks."""

    engine: Name
    token: Whole
    row: Name
    block_tokens: Count
    tier: Tier
    hashes: Hashes


class Removed(Struct, array_like=True, frozen=True, tag=9):
    """The engine announced that it dropped these blocks."""

    engine: Name
    token: Whole
    row: Name
    block_tokens: Count
    tier: Tier
    hashes: Hashes


class Cleared(Struct, array_like=True, frozen=True, tag=10):
    """The engine dropped every block, or what it holds is told anew."""

    engine: Name
    token: Whole
    row: Name


class Feed(Struct, array_like=True, frozen=True, tag=11):
    """How the engine's stream of block events stands, by the member who listens to it."""

    engine: Name
    token: Whole
    state: FeedState
    rows: Annotated[tuple[Name, ...], Meta(max_length=1024)]


LedgerEvent: TypeAlias = Sent | Prefilled | Producing | Ended | Held | Gone | Ask
BlocksEvent: TypeAlias = Stored | Removed | Cleared | Feed
WireEvent: TypeAlias = LedgerEvent | BlocksEvent


class Message(Struct, array_like=True, frozen=True):
    """What one member says at once; in a shard its messages are numbered without a gap, from 1."""

    member: Name
    epoch: Whole
    sequence: Whole
    lease_ms: Annotated[int, Meta(ge=1, le=86_400_000)]
    age_us: Whole
    """How long its first event waited to be sent."""
    events: tuple[WireEvent, ...]


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """The message as bytes."""
    return bytes((VERSION,)) + _ENCODER.encode(message)


def decode(data: bytes) -> Message:
    """The message in these bytes. Raises UnknownVersion, MalformedMessage."""
    if not data or len(data) > MAX_MESSAGE_BYTES:
        raise MalformedMessage(f"a message of {len(data)} bytes")
    if data[0] != VERSION:
        raise UnknownVersion(f"a message of version {data[0]}; this release speaks {VERSION}")
    try:
        message = _DECODER.decode(data[1:])
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise MalformedMessage(f"not a message: {error}") from None
    for event in message.events:
        if isinstance(event, Sent | Stored | Removed) and len(event.hashes) % HASH_BYTES:
            raise MalformedMessage("half a block hash")
    return message


def shard_of(name: str, shard_count: int) -> int:
    """The shard of a member's ledger, or of an engine's blocks: what is said of one name stays in order."""
    return zlib.crc32(name.encode()) % shard_count


def packed(hashes: BlockHashes) -> bytes:
    """Block hashes as bytes, 8 each, little-endian."""
    return hashes.astype("<u8", copy=False).tobytes()


def unpacked(data: bytes) -> BlockHashes:
    """Block hashes of bytes, shape (len(data) // 8,)."""
    return np.frombuffer(data, "<u8").astype(np.uint64, copy=False)


def steps(numbers: list[int]) -> tuple[int, ...]:
    """Ascending whole numbers, each as its distance from the one before (the first from 0)."""
    return tuple(number - before for before, number in zip([0, *numbers], numbers, strict=False))
