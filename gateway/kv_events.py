"""Follows the KV cache events of engines over ZMQ and hands them on as core events.

One `KvEventSubscriber` per data-parallel rank. It owns three sockets: SUB for the published messages, a monitor that
says when the connection stands and when it is gone, and, while something is to be repaired, a DEALER for a replay. All
thinking is in adapters/kv_stream.py; here bytes are moved and silence is judged.

Silence alone proves nothing: an idle engine publishes nothing. So ZMQ's own heartbeats keep the connection honest, and
a peer that does not answer them counts as gone after `heartbeat_timeout_s`. The owner is told of every change of state,
for an index that is not fed any more must not be believed.

Messages that wait in the socket are taken together and folded, so the work per message sinks as the load rises, and the
event loop gets its turn every `_BURST_MESSAGES` messages.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from adapters.kv_events import KvEventSource
from adapters.kv_stream import KvEventStream
from adapters.kv_translate import BlockEvent
from gateway.core.errors import MalformedEngineData

_BURST_MESSAGES = 64
_CONNECTED = zmq.EVENT_HANDSHAKE_SUCCEEDED
_WATCHED = _CONNECTED | zmq.EVENT_DISCONNECTED


class SourceState(StrEnum):
    """Whether the events of a source can be relied on."""

    CONNECTING = "connecting"
    """Never connected yet."""
    LIVE = "live"
    """Connected, and nothing known to be missing."""
    REPAIRING = "repairing"
    """Connected; messages that were missed are being replayed."""
    LOST = "lost"
    """Was connected and is not any more."""


@dataclass(frozen=True, slots=True)
class KvEventLimits:
    """Bounds of one subscription."""

    max_blocks: int = 2_000_000
    """Blocks followed per tier; 31 bytes each."""
    heartbeat_interval_s: float = 1.0
    heartbeat_timeout_s: float = 3.0
    """A peer that answers no heartbeat for so long counts as gone."""
    replay_timeout_s: float = 5.0
    """A replay that sends nothing for so long has failed. vLLM looks for requests every 0.1 s."""
    received_messages: int = 100_000
    """Messages that may wait in the SUB socket; beyond that they are dropped, which is noticed and repaired."""


@dataclass(slots=True)
class KvEventCounts:
    """What happened on one subscription since its start."""

    messages: int = 0
    replayed_messages: int = 0
    malformed_messages: int = 0
    replays: int = 0
    failed_replays: int = 0


def holder_id(source: KvEventSource) -> str:
    """The id under which the index knows this rank's cache: the engine's, with `/dp<rank>` from the second rank on.

    Ranks of one engine have caches of their own: what one drops another may still hold.
    """
    return source.engine_id if source.dp_rank == 0 else f"{source.engine_id}/dp{source.dp_rank}"


@dataclass(eq=False)
class KvEventSubscriber:
    """Follows one source until cancelled. `run` never ends by itself and never raises for what an engine sends."""

    source: KvEventSource
    on_events: Callable[[Sequence[BlockEvent]], None]
    """Called on the event loop with what changed, in order."""
    on_state: Callable[[SourceState], None]
    """Called on the event loop at every change of state."""
    limits: KvEventLimits = field(default_factory=KvEventLimits)
    counts: KvEventCounts = field(default_factory=KvEventCounts)

    def __post_init__(self) -> None:
        self.state = SourceState.CONNECTING
        self.stream = KvEventStream(
            holder_id(self.source),
            max_blocks=self.limits.max_blocks,
            can_replay=self.source.replay_endpoint is not None,
        )

    async def run(self) -> None:
        """Subscribes and hands on events until cancelled; connects again by itself, for ever."""
        context = zmq.asyncio.Context()
        socket = self._open(context, zmq.SUB)
        socket.set(zmq.RCVHWM, self.limits.received_messages)
        socket.subscribe(self.source.topic.encode())
        monitor = socket.get_monitor_socket(_WATCHED)
        try:
            socket.connect(self.source.endpoint)
            await self._follow(context, socket, monitor)
        finally:
            socket.disable_monitor()
            context.destroy(linger=0)

    async def _follow(
        self, context: zmq.asyncio.Context, socket: zmq.asyncio.Socket, monitor: zmq.asyncio.Socket
    ) -> None:
        poller = zmq.asyncio.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(monitor, zmq.POLLIN)
        while True:
            ready = dict(await poller.poll())
            replay_from = None
            if monitor in ready:
                replay_from = self._connection_changed(await monitor.recv_multipart())
            if socket in ready and replay_from is None:
                replay_from = await self._receive(socket)
            if replay_from is not None:
                await self._repair(context, replay_from)
            self._hand_on()

    def _connection_changed(self, message: list[bytes]) -> int | None:
        """Notes that the connection stands or is gone; the number to replay from when it stands."""
        if parse_monitor_message(message)["event"] == _CONNECTED:
            replay_from = self.stream.connected()
            self._change_state(SourceState.LIVE if replay_from is None else SourceState.REPAIRING)
            return replay_from
        self._change_state(SourceState.LOST)
        return None

    async def _receive(self, socket: zmq.asyncio.Socket) -> int | None:
        """Takes in what waits in the socket, up to a burst or a gap: the number to replay from, or None."""
        for _ in range(_BURST_MESSAGES):
            if not await socket.poll(0):
                break
            self.counts.messages += 1
            try:
                replay_from = self.stream.live(await socket.recv_multipart())
            except MalformedEngineData:
                self.counts.malformed_messages += 1
                continue
            if replay_from is not None:
                return replay_from
        return None

    async def _repair(self, context: zmq.asyncio.Context, replay_from: int) -> None:
        """Fetches missed messages, from an earlier number again when the engine turns out to have restarted."""
        self._change_state(SourceState.REPAIRING)
        next_from: int | None = replay_from
        while next_from is not None:
            self.counts.replays += 1
            try:
                next_from = await self._replay(context, next_from)
            except TimeoutError:
                self.counts.failed_replays += 1
                self.stream.replay_failed()
                next_from = None
        self._change_state(SourceState.LIVE)

    async def _replay(self, context: zmq.asyncio.Context, first_number: int) -> int | None:
        """One replay to its end: the number to start another from, or None. Raises TimeoutError."""
        assert self.source.replay_endpoint is not None
        socket = self._open(context, zmq.DEALER)
        try:
            socket.connect(self.source.replay_endpoint)
            await socket.send_multipart([b"", first_number.to_bytes(8, "big")])
            while True:
                if not await socket.poll(int(self.limits.replay_timeout_s * 1000)):
                    raise TimeoutError
                self.counts.replayed_messages += 1
                try:
                    next_from = self.stream.replayed(await socket.recv_multipart())
                except MalformedEngineData:
                    self.counts.malformed_messages += 1
                    continue
                if not self.stream.is_replaying or next_from is not None:
                    return next_from
                if self.counts.replayed_messages % _BURST_MESSAGES == 0:
                    self._hand_on()
                    await asyncio.sleep(0)
        finally:
            socket.close(linger=0)

    def _open(self, context: zmq.asyncio.Context, kind: int) -> zmq.asyncio.Socket:
        socket = context.socket(kind)
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.HEARTBEAT_IVL, int(self.limits.heartbeat_interval_s * 1000))
        socket.set(zmq.HEARTBEAT_TIMEOUT, int(self.limits.heartbeat_timeout_s * 1000))
        return socket

    def _hand_on(self) -> None:
        events = self.stream.take()
        if events:
            self.on_events(events)

    def _change_state(self, state: SourceState) -> None:
        if state is not self.state:
            self.state = state
            self.on_state(state)
