"""The KV cache events of vLLM and SGLang as typed values: frames in, events out, nothing remembered.

An engine publishes, per data-parallel rank, ZMQ messages of three frames `[topic, sequence number, payload]`. The
sequence number has 8 bytes, big-endian; the payload is msgpack: `[timestamp, events, rank]`. Today's engines write each
event as a map with a `type`, older ones as an array `[type, field, field, ...]`, some write the batch itself as a map.
All of these are read. Fields that we do not know are ignored: both engines append new ones.

Source: vllm/distributed/kv_events.py (0.32.0) and sglang/srt/disaggregation/kv_events.py (0.5.23).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import msgspec

from gateway.core.errors import MalformedEngineData
from gateway.core.events import Tier

EngineHash: TypeAlias = int
"""The low 64 bits of an engine's own block hash, unsigned. SGLang sends signed numbers, vLLM can send bytes."""

REPLAY_END = b"\xff" * 8
"""Sequence number of the message that ends a replay."""

_LOW_64 = (1 << 64) - 1
_TIERS = {
    "gpu": Tier.DEVICE,
    "device": Tier.DEVICE,
    "cpu": Tier.HOST,
    "cpu_pinned": Tier.HOST,
    "host": Tier.HOST,
    "disk": Tier.DISK,
    "storage": Tier.DISK,
    "external": Tier.REMOTE,
    "remote": Tier.REMOTE,
}
_FULL_ATTENTION = (None, "full_attention", "mla_attention")


class BlockStored(msgspec.Struct, frozen=True, tag_field="type", tag="BlockStored"):
    """Blocks entered the cache. `token_ids` covers all of them, or is empty when only their place is new.

    Under speculative decoding with look-ahead keys an engine sends pairs (token, next token): the first is kept.
    """

    block_hashes: list[int | bytes]
    parent_block_hash: int | bytes | None = None
    token_ids: array = array("Q")  # type: ignore[type-arg]  # msgspec knows the bare type only
    block_size: int = 0
    lora_id: int | str | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[object] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    cache_salt: str | None = None

    @property
    def is_full_attention(self) -> bool:
        """Whether the block is of a KV group in which a prefix hit needs every block (not a sliding window)."""
        return self.kv_cache_spec_kind in _FULL_ATTENTION


class BlockRemoved(msgspec.Struct, frozen=True, tag_field="type", tag="BlockRemoved"):
    """Blocks left one tier of the cache."""

    block_hashes: list[int | bytes]
    medium: str | None = None
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, frozen=True, tag_field="type", tag="AllBlocksCleared"):
    """The cache was reset."""


CacheEvent: TypeAlias = BlockStored | BlockRemoved | AllBlocksCleared


def _decode_tokens(kind: type, value: object) -> object:
    """Token ids as an array of 64-bit words: kept as a list they would be 32 bytes each and slow to gather later."""
    if not isinstance(value, list):
        raise ValueError("token ids are not a list")
    if value and isinstance(value[0], list):
        value = [token for token, _ in value]
    try:
        return array("Q", value)
    except OverflowError as error:
        raise ValueError(f"token id out of range: {error}") from error


class _Batch(msgspec.Struct, frozen=True, array_like=True):
    """The batch as today's engines write it."""

    timestamp: float
    events: list[CacheEvent]


_DECODER = msgspec.msgpack.Decoder(_Batch, dec_hook=_decode_tokens)
_ANY_DECODER = msgspec.msgpack.Decoder()
_EVENT_TYPES: dict[str, type[CacheEvent]] = {
    "BlockStored": BlockStored,
    "BlockRemoved": BlockRemoved,
    "AllBlocksCleared": AllBlocksCleared,
}
# Field order of the array form: vLLM's declaration order, of which older engines sent a beginning.
_POSITIONS: dict[str, tuple[str, ...]] = {
    "BlockStored": BlockStored.__struct_fields__[:10],
    "BlockRemoved": BlockRemoved.__struct_fields__,
    "AllBlocksCleared": (),
}


def decode_frames(frames: Sequence[bytes]) -> tuple[int, bytes]:
    """The sequence number and the payload of a message, live or replayed (a replay has no or an empty topic in front).

    Raises MalformedEngineData.
    """
    if len(frames) < 2 or len(frames[-2]) != 8:
        raise MalformedEngineData(f"a KV event message of {len(frames)} frames without a sequence number")
    return int.from_bytes(frames[-2], "big"), frames[-1]


def decode_batch(payload: bytes) -> list[CacheEvent]:
    """The events of one message, in order; those of unknown types left out. Raises MalformedEngineData."""
    try:
        return _checked(_DECODER.decode(payload).events)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return _checked(_decode_other_forms(payload))


def tier_of(medium: str | None) -> Tier:
    """The tier that a medium's name means; unnamed is device memory. Raises MalformedEngineData."""
    if medium is None:
        return Tier.DEVICE
    tier = _TIERS.get(medium.lower())
    if tier is None:
        raise MalformedEngineData(f"unknown KV medium {medium[:40]!r}")
    return tier


def engine_hashes(values: Sequence[int | bytes]) -> list[EngineHash]:
    """The low 64 bits of an engine's block hashes, unsigned, from whichever form it sends."""
    return [(int.from_bytes(v[-8:], "big") if isinstance(v, bytes) else v) & _LOW_64 for v in values]


def _decode_other_forms(payload: bytes) -> list[CacheEvent]:
    """Events of a batch that is a map, or that has events as arrays or of types we do not know."""
    try:
        batch = _ANY_DECODER.decode(payload)
        if isinstance(batch, dict):
            batch = [batch.get("ts"), batch.get("events")]
        if not isinstance(batch, list) or len(batch) < 2 or not isinstance(batch[1], list):
            raise MalformedEngineData("a KV event batch is not [timestamp, events, ...]")
        decoded = [_decode_event(event) for event in batch[1]]
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedEngineData(f"KV events: {error}") from error
    return [event for event in decoded if event is not None]


def _decode_event(event: object) -> CacheEvent | None:
    """One event in map or array form; None for a type we do not know."""
    if isinstance(event, list) and event and isinstance(event[0], str):
        event = {"type": event[0], **dict(zip(_POSITIONS.get(event[0], ()), event[1:], strict=False))}
    if not isinstance(event, dict) or not isinstance(event.get("type"), str):
        raise MalformedEngineData("a KV event is neither a map with a type nor an array that starts with one")
    kind = _EVENT_TYPES.get(event["type"])
    if kind is None:
        return None
    return msgspec.convert(event, kind, dec_hook=_decode_tokens)


def _checked(events: list[CacheEvent]) -> list[CacheEvent]:
    """The events, each consistent in itself. Raises MalformedEngineData."""
    for event in events:
        if isinstance(event, BlockStored):
            _check_stored(event)
        if not isinstance(event, AllBlocksCleared):
            tier_of(event.medium)
    return events


def _check_stored(event: BlockStored) -> None:
    block_count = len(event.block_hashes)
    if event.token_ids and (event.block_size < 1 or len(event.token_ids) != event.block_size * block_count):
        raise MalformedEngineData(
            f"BlockStored with {block_count} blocks of {event.block_size} and {len(event.token_ids)} tokens"
        )
    if event.extra_keys is not None and len(event.extra_keys) != block_count:
        raise MalformedEngineData(f"BlockStored with {block_count} blocks and {len(event.extra_keys)} extra keys")


@dataclass(frozen=True, slots=True)
class KvEventSource:
    """Where one data-parallel rank of an engine publishes its cache events."""

    engine_id: str
    dp_rank: int
    endpoint: str
    """ZMQ address to subscribe to."""
    replay_endpoint: str | None = None
    """ZMQ address that sends past messages again; None: the engine has none."""
    topic: str = ""


def parse_kv_event_sources(body: bytes, *, engine_id: str, host: str) -> tuple[KvEventSource, ...]:
    """The sources that vLLM's `/kv_event_sources` names, by rank; `host` replaces wildcards.

    The answer maps each rank to its resolved configuration: ports are final. Raises MalformedEngineData.
    Source: vllm/entrypoints/serve/instrumentator/basic.py (0.32.0).
    """
    try:
        ranks = msgspec.json.decode(body, type=dict[int, _ZmqConfig])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedEngineData(f"/kv_event_sources: {error}") from error
    return tuple(
        KvEventSource(
            engine_id, rank, _reach(c.endpoint, host), c.replay_endpoint and _reach(c.replay_endpoint, host), c.topic
        )
        for rank, c in sorted(ranks.items())
        if c.endpoint and c.publisher in (None, "zmq")
    )


def parse_server_info(body: bytes, *, engine_id: str, host: str) -> tuple[KvEventSource, ...]:
    """The sources that SGLang's `/server_info` names, by rank; none when it publishes nothing.

    Port = base + rank. Raises MalformedEngineData. Source: sglang/srt/runtime_context.py (0.5.23).
    """
    try:
        config = msgspec.json.decode(body, type=_ServerInfo).kv_events
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedEngineData(f"/server_info: {error}") from error
    if config is None or config.publisher != "zmq":
        return ()
    address = _reach(f"tcp://{config.endpoint_host}", host)
    replay = config.replay_endpoint_port_base
    return tuple(
        KvEventSource(
            engine_id,
            rank,
            f"{address}:{config.endpoint_port_base + rank}",
            None if replay is None else f"{address}:{replay + rank}",
            config.topic,
        )
        for rank in range(config.dp_size)
    )


class _ZmqConfig(msgspec.Struct):
    endpoint: str | None = None
    replay_endpoint: str | None = None
    topic: str = ""
    publisher: str | None = None


class _SglangEvents(msgspec.Struct):
    endpoint_port_base: int
    publisher: str = "zmq"
    endpoint_host: str = "*"
    topic: str = ""
    dp_size: int = 1
    replay_endpoint_port_base: int | None = None


class _ServerInfo(msgspec.Struct):
    kv_events: _SglangEvents | None = None


def _reach(address: str, host: str) -> str:
    """The address with a wildcard host replaced by one that can be connected to."""
    for wildcard in ("*", "0.0.0.0", "[::]"):
        if address.startswith(f"tcp://{wildcard}"):
            return f"tcp://{host}{address[len('tcp://' + wildcard) :]}"
    return address
