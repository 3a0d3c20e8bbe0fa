"""`sluice bench store`: what it costs that gateways know of each other, over a real Redis.

    publish     one gateway tells as much as it can: events per second, its own processor alone
    follow      one gateway takes in what waits in the stream, into ledger and index
    at a rate   another process tells of so many requests per second; the share of one processor that following takes,
                and the time from telling to being applied here (both processes read the same monotonic clock)
    blocks      a million blocks of an index as a snapshot, and heard block by block: once by listening to the engine
                (decode, chain, hash), once by following the gateway that listens. That ratio is why one listens for all

A request here is six events: dispatch, end of its prefill, first token, twice progress, end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import time
from collections.abc import Sequence
from itertools import count
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import numpy as np
import uvloop

from adapters.kv_stream import KvEventStream
from gateway.core.admission import AdmissionLimits
from gateway.core.events import (
    BlocksStored,
    EngineFound,
    EngineHealth,
    FeedState,
    Finished,
    FirstToken,
    KvFeed,
    PeerSent,
    PrefillDone,
    Progress,
)
from gateway.core.scheduler import Scheduler
from gateway.core.types import Engine, Estimate, Health, Request, Role
from gateway.driver import Driver
from gateway.journal import Journal
from gateway.policies.least_work import LeastWork
from gateway.stores import Store, snapshot
from gateway.stores.codec import encode
from gateway.stores.follower import Follower
from gateway.stores.outbox import Letter, Outbox
from gateway.stores.redis import RedisSettings, RedisStore
from loadtest.redis_process import redis_at_hand
from predictors.online import Online

EVENTS_PER_REQUEST = 6
ENGINES = 8
FLUSH_S = 0.002
LIVES = 64
"""Requests of the bench in flight at once; the newest replaces the oldest."""
BLOCK_TOKENS = 16
MESSAGE_BLOCKS = 128


def a_scheduler(max_blocks: int = 200_000) -> Scheduler:
    """A scheduler that knows `ENGINES` engines of each role."""
    scheduler = Scheduler(
        policy=LeastWork(),
        predictor=Online(),
        limits=AdmissionLimits(),
        rng=random.Random(0),
        max_blocks=max_blocks,
    )
    for number in range(ENGINES):
        for letter, role in (("p", Role.PREFILL), ("d", Role.DECODE)):
            name = f"{letter}{number}.engines.svc:8000"
            engine = Engine(name, f"http://{name}", role, models=("m",), block_tokens=BLOCK_TOKENS)
            scheduler.apply(EngineFound(engine), now=0.0)
            scheduler.apply(EngineHealth(name, Health.UP), now=0.0)
    return scheduler


class Talker:
    """Tells the lives of requests that exist only here."""

    def __init__(self, name: str) -> None:
        self.outbox = Outbox(name, a_scheduler(), shard_count=1, lease_s=5.0, max_events=1_000_000)
        self.sent_count = 0
        self._numbers = count(1)

    def tell(self, now: float) -> None:
        """One more request begins, and the one that began `LIVES` before it goes through its life."""
        number = next(self._numbers)
        self.sent_count = number
        names = (f"p{number % ENGINES}.engines.svc:8000", f"d{number % ENGINES}.engines.svc:8000")
        estimate = Estimate(*names, wait_s=0.1, fetch_s=0.0, prefill_s=0.3, hand_off_s=0.02, join_s=0.02, tbt_s=0.03)
        request = Request(f"r{number}", "m", now, prompt_tokens=2000 + number % 500, max_output_tokens=400)
        self.outbox.sent(request, estimate, now=now)
        old = f"r{number - LIVES}"
        life = PrefillDone(old), FirstToken(old), Progress(old, 32), Progress(old, 64), Finished(old)
        for event in life:
            self.outbox.told(event, now=now)


async def publish(store: Store, requests: int) -> dict[str, float]:
    """How fast one gateway tells, and what it takes."""
    talker, told_bytes = Talker("talker"), 0
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    for first in range(0, requests, LIVES):
        for _ in range(min(LIVES, requests - first)):
            talker.tell(0.0)
        told_bytes += sum([await _append(store, letter) for letter in talker.outbox.take(now=0.0)])
    wall_s, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
    events = requests * EVENTS_PER_REQUEST
    return {
        "events_per_s": events / wall_s,
        "cpu_us_per_event": cpu_s / events * 1e6,
        "bytes_per_event": told_bytes / events,
    }


async def _append(store: Store, letter: Letter) -> int:
    data = encode(letter.message)
    await store.append(letter.shard, data)
    return len(data)


async def follow(store: Store) -> dict[str, float]:
    """How fast one gateway takes in what waits."""
    driver, follower = Driver(a_scheduler(), Journal()), Follower("follower", follows_blocks=lambda engine_id: True)
    position, events = "0-0", 0
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    while entries := await store.read(0, position, wait_s=0.01):
        for entry in entries:
            heard = follower.take(0, entry.data)
            driver.follow(heard)
            events += len(heard)
            position = entry.position
    wall_s, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
    driver.close()
    return {"events": events, "events_per_s": events / wall_s, "cpu_us_per_event": cpu_s / events * 1e6}


# ---- at a rate -------------------------------------------------------------------------------------------------------


def _talk_at(url: str, rate: float, seconds: float, pipe: Connection) -> None:
    uvloop.run(_talk(url, rate, seconds, pipe))


async def _talk(url: str, rate: float, seconds: float, pipe: Connection) -> None:
    """Another process: tells at that rate, and in the end when it told what."""
    store = RedisStore(RedisSettings(url))
    await store.open()
    talker, told_at = Talker("paced"), {}
    began_s = time.monotonic()
    cpu_s = time.process_time()
    while (now := time.monotonic()) < began_s + seconds:
        while talker.sent_count < (now - began_s) * rate:
            talker.tell(now)
            told_at[talker.sent_count] = time.monotonic()
        for letter in talker.outbox.take(now=now):
            await _append(store, letter)
        await asyncio.sleep(FLUSH_S)
    cpu_s = time.process_time() - cpu_s
    await store.close()
    pipe.send((told_at, cpu_s / (time.monotonic() - began_s)))


async def follow_at(url: str, rate: float, seconds: float) -> dict[str, float]:
    """The share of a processor that following takes at that rate, and how old what is applied is."""
    store = RedisStore(RedisSettings(url))
    await store.open()
    position = await store.end(0)
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_talk_at, args=(url, rate, seconds, there))
    process.start()
    driver, follower = Driver(a_scheduler(), Journal()), Follower("follower", follows_blocks=lambda engine_id: True)
    applied_at: dict[int, float] = {}
    first_s = last_s = 0.0
    cpu_s = first_cpu_s = 0.0
    while not here.poll():
        entries = await store.read(0, position, wait_s=0.2)
        for entry in entries:
            heard = follower.take(0, entry.data)
            driver.follow(heard)
            last_s, cpu_s = time.monotonic(), time.process_time()
            applied_at.update((event.number, last_s) for event in heard if isinstance(event, PeerSent))
            position = entry.position
        if entries and not first_s:
            first_s, first_cpu_s = last_s, cpu_s
        await asyncio.sleep(FLUSH_S if entries else 0)
    told_at, talker_share = here.recv()
    process.join()
    await store.close()
    driver.close()
    ages_s = np.array([applied_at[number] - at for number, at in told_at.items() if number in applied_at])
    span_s = last_s - first_s
    return {
        "requests_per_s": len(ages_s) / span_s,
        "cpu_share": (cpu_s - first_cpu_s) / span_s,
        "publisher_cpu_share": talker_share,
        "staleness_p50_ms": float(np.quantile(ages_s, 0.5)) * 1e3,
        "staleness_p99_ms": float(np.quantile(ages_s, 0.99)) * 1e3,
    }


# ---- blocks ----------------------------------------------------------------------------------------------------------


async def blocks(store: Store, block_count: int) -> dict[str, float]:
    """A snapshot of that many blocks in the store, and taking it over."""
    row = "p0.engines.svc:8000"
    scheduler = _with_feed(a_scheduler(max_blocks=block_count + block_count // 8), row)
    rng = np.random.default_rng(0)
    scheduler.prefixes.index.store(row, rng.integers(1, 2**63, block_count).astype(np.uint64))
    began_s = time.perf_counter()
    parts = [snapshot.head_of(scheduler, ("0-0",), {}), *snapshot.stretches(scheduler.prefixes)]
    made_s = time.perf_counter() - began_s
    await store.save_snapshot(parts)
    began_s = time.perf_counter()
    fresh = _with_feed(a_scheduler(max_blocks=block_count + block_count // 8), row)
    for part in (await store.load_snapshot() or ())[1:]:
        snapshot.restore(part, fresh.prefixes, now=0.0)
    loaded_s = time.perf_counter() - began_s
    assert fresh.prefixes.index.engine_block_count(row) == scheduler.prefixes.index.engine_block_count(row)
    return {
        "blocks": block_count,
        "bytes_per_million_blocks": sum(map(len, parts)) / block_count * 1e6,
        "made_s": made_s,
        "longest_stretch_blocks": max(map(len, parts)) / 8,
        "taken_over_s": loaded_s,
    }


def _with_feed(scheduler: Scheduler, row: str) -> Scheduler:
    scheduler.apply(KvFeed(row, FeedState.LIVE, (row,)), now=0.0)
    return scheduler


def listen(block_count: int) -> dict[str, float]:
    """Processor time per block of hearing it from the engine, and of following the gateway that heard it."""
    row = "p0.engines.svc:8000"
    messages = [_engine_message(number) for number in range(block_count // MESSAGE_BLOCKS)]
    own = _with_feed(a_scheduler(), row)
    outbox = Outbox("ears", own, shard_count=1, lease_s=5.0, max_events=1_000_000)
    outbox.listens(row, 1)
    outbox.told(KvFeed(row, FeedState.LIVE, (row,)), now=0.0)
    stream = KvEventStream(row, max_blocks=block_count + 1, can_replay=False)
    heard: list[BlocksStored] = []
    began_s = time.process_time()
    for frames in messages:
        stream.live(frames)
        for event in stream.take():
            own.apply(event, now=0.0)
            if isinstance(event, BlocksStored):
                heard.append(event)
    listened_s = time.process_time() - began_s
    began_s, letters = time.process_time(), []
    for event in heard:
        outbox.told(event, now=0.0)
        letters += [encode(letter.message) for letter in outbox.take(now=0.0)]
    told_s = time.process_time() - began_s
    other, follower = _with_feed(a_scheduler(), row), Follower("other", follows_blocks=lambda engine_id: True)
    began_s = time.process_time()
    for letter in letters:
        for followed in follower.take(0, letter):
            other.apply(followed, now=0.0)
    followed_s = time.process_time() - began_s
    return {
        "listen_us_per_block": listened_s / block_count * 1e6,
        "tell_us_per_block": told_s / block_count * 1e6,
        "follow_us_per_block": followed_s / block_count * 1e6,
        "bytes_per_block": sum(map(len, letters)) / block_count,
    }


def _engine_message(number: int) -> list[bytes]:
    """What vLLM publishes of one prompt of `MESSAGE_BLOCKS` blocks."""
    tokens = list(range(number, number + MESSAGE_BLOCKS * BLOCK_TOKENS))
    names = [number * MESSAGE_BLOCKS + block + 1 for block in range(MESSAGE_BLOCKS)]
    stored = ["BlockStored", names, None, tokens, BLOCK_TOKENS, None, "GPU"]
    payload = msgspec.msgpack.encode([0.0, [stored], None])
    return [b"", number.to_bytes(8, "big"), payload]


# ---- the command -----------------------------------------------------------------------------------------------------


async def run(url: str, flags: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    store = RedisStore(RedisSettings(url, max_bytes=2**30, timeout_s=10.0))
    await store.open()
    try:
        return {
            "publish": await publish(store, flags.requests),
            "follow": await follow(store),
            "at_rate": await follow_at(url, flags.rate, flags.seconds),
            "snapshot": await blocks(store, flags.blocks),
            "kv_events": listen(min(flags.blocks, 200_000)),
        }
    finally:
        await store.close()


def main(words: Sequence[str]) -> int:
    """The command `sluice bench store`; returns 0."""
    parser = argparse.ArgumentParser(prog="sluice bench store", description="What it costs to share one view.")
    parser.add_argument("--url", help="a Redis to use (default: one of our own, on this machine)")
    parser.add_argument("--requests", type=int, default=50_000, help="told as fast as possible (default 50000)")
    parser.add_argument("--rate", type=float, default=5000.0, help="requests per second by the others (default 5000)")
    parser.add_argument("--seconds", type=float, default=10.0, help="at that rate (default 10)")
    parser.add_argument("--blocks", type=int, default=1_000_000, help="of the index (default a million)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    flags = parser.parse_args(words)
    if flags.url is not None:
        result = uvloop.run(run(flags.url, flags))
    else:
        with redis_at_hand() as url:
            result = uvloop.run(run(url, flags))
    print(json.dumps(result) if flags.json else table(result))
    return 0


def table(result: dict[str, Any]) -> str:
    """The figures for people."""
    rows = [(f"{part} {name}", value) for part, values in result.items() for name, value in values.items()]
    return "\n".join(f"{name:<40}{value:>16,.3f}" for name, value in rows)
