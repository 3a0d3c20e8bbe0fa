import asyncio
import contextlib

import numpy as np
import pytest
import zmq
import zmq.asyncio

from adapters.kv_events import KvEventSource
from gateway.core.blocks import hash_prompt
from gateway.core.index import PrefixIndex
from gateway.kv_events import KvEventLimits, KvEventSubscriber, SourceState, holder_id
from tests.adapters.kv_engine import KvEngine

LIMIT_S = 10.0


class Publisher:
    """An engine's two sockets: XPUB (a PUB that sees subscriptions) and ROUTER for replays."""

    def __init__(self, context, *, ports=(0, 0), can_replay=True):
        self.engine = KvEngine()
        self.oldest = 0
        self.pub, self.router = context.socket(zmq.XPUB), context.socket(zmq.ROUTER)
        self.ports = [self.bind(socket, port) for socket, port in zip((self.pub, self.router), ports, strict=True)]
        self.task = asyncio.create_task(self.serve_replays()) if can_replay else None

    def bind(self, socket, port):
        socket.set(zmq.LINGER, 0)
        if port:
            socket.bind(f"tcp://127.0.0.1:{port}")
            return port
        return socket.bind_to_random_port("tcp://127.0.0.1")

    async def serve_replays(self):
        while True:
            client, _, first = await self.router.recv_multipart()
            for frames in self.engine.replay(int.from_bytes(first, "big"), self.oldest):
                await self.router.send_multipart([client, *frames])

    async def say(self, prompt, *, is_sent=True, payload=None):
        """Caches a prompt and publishes that; unsent it is only kept for replays."""
        self.engine.store(prompt)
        topic, number, written = self.engine.publish()
        if is_sent:
            await self.pub.send_multipart([topic, number, payload or written])

    async def close(self):
        if self.task:
            self.task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self.task
        self.pub.close()
        self.router.close()


class Listener:
    """A subscriber with the index it feeds; `until` waits for the next change."""

    def __init__(self, publisher, *, can_replay=True, replay_timeout_s=5.0):
        self.index = PrefixIndex(max_blocks=1000)
        self.index.add_engine("e")
        self.states = []
        self.changed = asyncio.Event()
        pub, router = (f"tcp://127.0.0.1:{port}" for port in publisher.ports)
        source = KvEventSource("e", 0, pub, router if can_replay else None)
        limits = KvEventLimits(max_blocks=1000, replay_timeout_s=replay_timeout_s)
        self.subscriber = KvEventSubscriber(source, self.on_events, self.on_state, limits)

    def on_events(self, events):
        for event in events:
            self.index.apply(event)
        self.changed.set()

    def on_state(self, state):
        self.states.append(state)
        self.changed.set()

    def held(self, prompt):
        return int(self.index.match({2: hash_prompt(np.array(prompt), 2)}).cached_tokens[0])

    async def until(self, condition):
        async with asyncio.timeout(LIMIT_S):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


@contextlib.asynccontextmanager
async def listening(publisher, **options):
    """A running listener whose subscription the publisher has seen."""
    listener = Listener(publisher, **options)
    task = asyncio.create_task(listener.subscriber.run())
    try:
        async with asyncio.timeout(LIMIT_S):
            await publisher.pub.recv()
        await listener.until(lambda: listener.subscriber.state is SourceState.LIVE)
        yield listener
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest.fixture
async def context():
    with zmq.asyncio.Context() as context:
        yield context


@pytest.fixture
async def publisher(context):
    publisher = Publisher(context)
    yield publisher
    await publisher.close()


async def test_what_was_said_before_and_after_connecting_reaches_the_index(publisher):
    await publisher.say([1, 2])
    async with listening(publisher) as listener:
        await publisher.say([1, 2, 3, 4])
        await listener.until(lambda: listener.held([1, 2, 3, 4]) == 4)
        assert listener.states == [SourceState.REPAIRING, SourceState.LIVE]


async def test_missed_messages_are_replayed(publisher):
    async with listening(publisher) as listener:
        await publisher.say([1, 2])
        await publisher.say([1, 2, 3, 4], is_sent=False)
        await publisher.say([1, 2, 3, 4, 5, 6])
        await listener.until(lambda: listener.held([1, 2, 3, 4, 5, 6]) == 6)
        assert listener.subscriber.stream.lost_count == 0


async def test_a_replay_of_many_messages_comes_whole(publisher):
    for token in range(300):
        await publisher.say([token, token], is_sent=False)
    async with listening(publisher) as listener:
        assert len(listener.index) == 300
        assert listener.subscriber.counts.replayed_messages == 301


async def test_a_restarted_engine_is_empty_then_right_again(context, publisher):
    async with listening(publisher) as listener:
        await publisher.say([1, 2])
        await listener.until(lambda: listener.held([1, 2]) == 2)
        await publisher.close()
        await listener.until(lambda: listener.subscriber.state is SourceState.LOST)
        reborn = Publisher(context, ports=publisher.ports)
        try:
            await reborn.say([7, 7])
            await listener.until(lambda: listener.held([7, 7]) == 2)
            assert listener.held([1, 2]) == 0
            assert listener.subscriber.stream.restart_count == 1
        finally:
            await reborn.close()


async def test_a_closed_connection_is_announced_and_an_idle_one_is_not(publisher):
    async with listening(publisher) as listener:
        assert listener.states[-1] is SourceState.LIVE
        await publisher.close()
        await listener.until(lambda: listener.states[-1] is SourceState.LOST)


async def test_without_a_replay_socket_missed_messages_empty_the_index(publisher):
    async with listening(publisher, can_replay=False) as listener:
        await publisher.say([1, 2])
        await publisher.say([3, 4], is_sent=False)
        await publisher.say([5, 6])
        await listener.until(lambda: listener.held([5, 6]) == 2)
        assert listener.held([1, 2]) == 0
        assert listener.states == [SourceState.LIVE]


async def test_a_replay_that_never_answers_is_given_up(context):
    publisher = Publisher(context, can_replay=False)
    try:
        async with listening(publisher, replay_timeout_s=0.05) as listener:
            assert listener.subscriber.counts.failed_replays == 1
            await publisher.say([1, 2])
            await listener.until(lambda: listener.held([1, 2]) == 2)
    finally:
        await publisher.close()


async def test_garbage_is_counted_and_repaired(publisher):
    async with listening(publisher) as listener:
        await publisher.say([1, 2], payload=b"\xc1")
        await publisher.say([1, 2, 3, 4])
        await listener.until(lambda: listener.held([1, 2, 3, 4]) == 4)
        assert listener.subscriber.counts.malformed_messages == 1


def test_each_rank_holds_a_cache_of_its_own():
    ids = [holder_id(KvEventSource("e", rank, "tcp://h:1")) for rank in range(3)]
    assert ids == ["e", "e/dp1", "e/dp2"]
