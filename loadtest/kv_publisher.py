"""KV events over ZMQ as vLLM 0.32.0 publishes them: PUB for the stream, ROUTER for replay.

Source: vllm distributed/kv_events.py, config/kv_events.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import msgspec
import zmq
import zmq.asyncio

from loadtest.kv_cache import BlockRemoved, BlockStored, KvEvent

_END = b"\xff" * 8


@dataclass(frozen=True, slots=True)
class KvEventSettings:
    """vLLM's `--kv-events-config`; a port 0 is any free one."""

    endpoint: str = "tcp://127.0.0.1:0"
    replay_endpoint: str | None = None
    buffer_steps: int = 10_000
    hwm: int = 100_000
    max_queue_size: int = 100_000
    topic: str = ""


class KvPublisher:
    """Publishes batches of KV events, numbered from 0, and replays the last `buffer_steps` of them."""

    def __init__(self, settings: KvEventSettings) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._pub = self._context.socket(zmq.PUB)
        self._pub.set_hwm(settings.hwm)
        endpoint = _bind(self._pub, settings.endpoint)
        self._router: zmq.asyncio.Socket | None = None
        replay_endpoint = None
        if settings.replay_endpoint is not None:
            self._router = zmq.asyncio.Context(self._context).socket(zmq.ROUTER)
            replay_endpoint = _bind(self._router, settings.replay_endpoint)
        self.settings = replace(settings, endpoint=endpoint, replay_endpoint=replay_endpoint)
        self._topic = settings.topic.encode()
        self._buffer: deque[tuple[int, bytes]] = deque(maxlen=settings.buffer_steps)
        self._next_seq = 0
        self._replays = asyncio.create_task(self._serve_replays())

    def source(self) -> dict[str, object]:
        """The resolved config, as `/kv_event_sources` shows it."""
        return {"enable_kv_cache_events": True, "publisher": "zmq"} | asdict(self.settings)

    def publish(self, events: Sequence[KvEvent]) -> None:
        """Sends one batch; nothing for no events."""
        if not events:
            return
        payload = msgspec.msgpack.encode([time.time(), [wire_event(event) for event in events], 0])
        self._pub.send_multipart((self._topic, self._next_seq.to_bytes(8, "big"), payload))
        self._buffer.append((self._next_seq, payload))
        self._next_seq += 1

    async def close(self) -> None:
        """Closes both sockets; what was not sent is lost."""
        self._replays.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._replays
        self._pub.close(linger=0)
        if self._router is not None:
            self._router.close(linger=0)
        self._context.term()

    async def _serve_replays(self) -> None:
        while self._router is not None:
            frames = await self._router.recv_multipart()
            if len(frames) != 3:
                continue
            client, _, start = frames
            first_seq = int.from_bytes(start, "big")
            for seq, payload in list(self._buffer):
                if seq >= first_seq:
                    frame = (client, b"", self._topic, seq.to_bytes(8, "big"), payload)
                    await self._router.send_multipart(frame)
            await self._router.send_multipart((client, b"", b"", _END, b""))


def _bind(socket: zmq.Socket[bytes] | zmq.asyncio.Socket, endpoint: str) -> str:
    socket.bind(endpoint[:-1] + "*" if endpoint.endswith(":0") else endpoint)
    return socket.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode()  # type: ignore[union-attr]


def wire_event(event: KvEvent) -> dict[str, object]:
    """One event as a map with its type; fields at their default are left out, as msgspec does for vLLM."""
    if isinstance(event, BlockStored):
        fields: dict[str, object] = {
            "type": "BlockStored",
            "block_hashes": event.block_hashes,
            "parent_block_hash": event.parent_block_hash,
            "token_ids": event.token_ids,
            "block_size": event.block_tokens,
            "lora_id": 1 if event.lora else None,
            "medium": "GPU",
            "lora_name": event.lora or None,
        }
        return fields | {"extra_keys": _extra_keys(event), "group_idx": 0, "kv_cache_spec_kind": "full_attention"}
    if isinstance(event, BlockRemoved):
        return {"type": "BlockRemoved", "block_hashes": [event.block_hash], "medium": "GPU", "group_idx": 0}
    return {"type": "AllBlocksCleared"}


def _extra_keys(event: BlockStored) -> list[list[str] | None]:
    """Per block: the adapter on every one, the salt on a prompt's first."""
    every = [event.lora] if event.lora else []
    is_first = event.parent_block_hash is None
    rows = [
        every + ([event.salt] if event.salt and is_first and i == 0 else []) for i in range(len(event.block_hashes))
    ]
    return [row or None for row in rows]
