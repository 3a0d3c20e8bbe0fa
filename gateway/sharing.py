"""Keeps this gateway and the others of one view: tells them what it does, follows what they do, over a store.

    join      open the store, find the place to read on from, take over a snapshot, tell all, ask all
    publish   every few milliseconds what the outbox holds, one message per shard
    follow    each shard, into the ledger and the index
    tend      renew the leases, listen to engines for all where nobody else does, write the snapshot now and then

The four run until the store fails one of them in whatever way. Then the gateway goes on with its own view, says so
once, and tries to join again, less often the longer it fails. Decisions never wait for any of it: the driver puts what
happened into the outbox and goes on, and the outbox is bounded.

While the store is away nothing can be renewed, so the others' reservations end by time and what they send shows in the
engines' reports instead; and every gateway listens to the engines' block events itself, until the store is back.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from secrets import token_hex
from typing import Any

import structlog

from gateway.core.events import BlocksCleared, BlocksStored, Event, Joined, KvFeed, PeerHolds, Tier
from gateway.core.leases import Leases
from gateway.core.types import BlockHashes, Estimate, Request
from gateway.driver import Driver
from gateway.stores import Store, StoreUnavailable, snapshot
from gateway.stores.codec import MalformedMessage, encode
from gateway.stores.follower import Follower
from gateway.stores.outbox import Outbox

READ_WAIT_S = 0.5
"""How long one read of a shard waits for an entry."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0
"""Between two attempts to join: a store that is back is noticed within a second, and never hammered."""
ENGINES_WAIT_S = 1.0
"""A snapshot is taken over when the engines of the configuration are known, or after so long."""
RENEWALS_PER_LEASE = 4
LISTEN_LEASE_S = 1.2
LISTEN_TRIES_PER_LEASE = 3
"""So a listener that died is followed by another within 1.6 s."""
TURN_EVENTS = 256
"""Followed events after which the event loop gets its turn: some 2 ms."""
RESTATED_EVENTS = 256
"""Events that may wait while blocks are told anew: of blocks, 8 MB."""
ASK_EVERY_S = 0.25
NAME_BYTES = 4

log = structlog.get_logger("sluice.store")


class StoreState(StrEnum):
    """How this gateway and the store stand; the word in `/ready`."""

    JOINING = "joining"
    CONNECTED = "connected"
    AWAY = "away"


@dataclass(frozen=True, slots=True)
class SharingLimits:
    """How often things are said, and for how long they hold."""

    shard_count: int = 1
    lease_s: float = 5.0
    flush_s: float = 0.002
    turn_s: float = 0.02
    snapshot_interval_s: float = 10.0
    max_events: int = 65_536
    is_listening_shared: bool = True
    """Whether one gateway listens to an engine for all; else every gateway listens itself."""


class Sharing:
    """One gateway's part in the common view."""

    def __init__(self, driver: Driver, store: Store, limits: SharingLimits, *, kind: str, gateway_id: str) -> None:
        """`kind` is the store's name in `/ready`. Two gateways of one `gateway_id` are still two: each adds its own
        random end to it."""
        self.kind = kind
        self.gateway_id = gateway_id
        self.member = f"{gateway_id}~{token_hex(NAME_BYTES)}"
        self.state = StoreState.JOINING
        self.reason = ""
        self.away_count = 0
        """How often the store was lost, since the start."""
        self.snapshot_blocks = 0
        """Blocks taken over at the start."""
        self.shareable: Callable[[], Iterable[str]] = tuple
        """Names the engines whose events one gateway may follow for all."""
        self.is_subscribed: Callable[[str], bool] = lambda engine_id: False
        """Whether this gateway is subscribed to an engine's events."""
        self._driver = driver
        self._store = store
        self._limits = limits
        self.outbox = Outbox(
            self.member,
            driver.scheduler,
            shard_count=limits.shard_count,
            lease_s=limits.lease_s,
            max_events=limits.max_events,
        )
        self.follower = Follower(self.member, follows_blocks=self._follows_blocks)
        self._has_mail = asyncio.Event()
        self._listening: dict[str, int] = {}
        self._generation: str | None = None
        self._positions: dict[int, str] = {}
        self._away_at: float | None = driver.now()
        self._asked_at: dict[str, float] = {}
        self._is_asked = self._is_asked_blocks = False
        self._joined_at = 0.0
        self._has_warned_of_twin = False
        self._told_faults = 0
        driver.listener = self
        driver.apply(Joined(self.member, limits.turn_s))

    # ---- what the driver tells --------------------------------------------------------------------------------------

    def sent(self, request: Request, estimate: Estimate, *, now: float) -> None:
        self.outbox.sent(request, estimate, now=now)
        self._has_mail.set()

    def told(self, event: Event, *, now: float) -> None:
        self.outbox.told(event, now=now)
        self._has_mail.set()

    def ended(self, request_id: str, *, is_finished: bool, now: float) -> None:
        self.outbox.ended(request_id, is_finished=is_finished, now=now)
        self._has_mail.set()

    # ---- what others ask --------------------------------------------------------------------------------------------

    def listens(self, engine_id: str) -> bool:
        """Whether this gateway has to follow the engine's block events itself."""
        if not self._limits.is_listening_shared or engine_id in self._listening:
            return True
        return self._away_at is not None and self._driver.now() - self._away_at > LISTEN_LEASE_S

    @property
    def leases(self) -> Leases:
        """What others have in flight."""
        return self._driver.scheduler.leases

    def status(self) -> dict[str, object]:
        """What `/ready` says of the store."""
        leases, counts = self.leases, self.follower.counts
        return {
            "name": self.kind,
            "state": self.state,
            "reason": self.reason or None,
            "gateway": self.member,
            "peers": leases.owner_count,
            "peers_in_flight": len(leases),
            "listens_to": sorted(self._listening),
            "dropped_events": self.outbox.dropped_count,
            "malformed_messages": counts.malformed,
            "unknown_versions": counts.unknown_versions,
            "gaps": counts.gaps,
            "expired_leases": leases.counts.expired,
            "fenced": leases.counts.fenced + counts.fenced,
        }

    # ---- the life of it ---------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Joins, and joins again whenever the store was lost, until cancelled."""
        pause_s = FIRST_PAUSE_S
        try:
            while True:
                try:
                    await self._join()
                    pause_s = FIRST_PAUSE_S
                except StoreUnavailable as failure:
                    self._lost(failure.message)
                else:
                    self._lost(await self._share())
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        finally:
            await self._leave()

    async def _share(self) -> str:
        """Publishes, follows and tends until the store fails; how it failed.

        The failure is told, not raised: a TaskGroup that fails in the turn in which its owner is cancelled forgets
        the cancellation, and a gateway that was to stop would go on for ever.
        """
        failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def until_failure(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
            try:
                await work()
            except StoreUnavailable as failure:
                if not failed.done():
                    failed.set_result(failure.message)

        shards = range(self._limits.shard_count)
        async with asyncio.TaskGroup() as group:
            works: list[Callable[[], Coroutine[Any, Any, None]]] = [self._publish, self._tend]
            works += [partial(self._follow, shard) for shard in shards]
            tasks = [group.create_task(until_failure(work)) for work in works]
            reason = await failed
            for task in tasks:
                task.cancel()
        return reason

    async def _join(self) -> None:
        generation = await self._store.open()
        is_first, is_empty = self._generation is None, self._generation not in (None, generation)
        if is_empty:
            self.follower.forget_tokens()
            self._positions.clear()
        shards = range(self._limits.shard_count)
        covered = [await self._covers(shard) for shard in shards]
        for shard in shards:
            if not covered[shard]:
                self._positions[shard] = await self._store.end(shard)
        is_warm = is_first and await self._warm_up()
        self._generation = generation
        self._listening.clear()
        await self._try_to_listen()
        now = self._driver.now()
        self.outbox.begin_epoch(now=now)
        self.outbox.ask("", wants_blocks=not (is_warm or (all(covered) and not is_first)), now=now)
        self._has_mail.set()
        self._back(now)

    async def _covers(self, shard: int) -> bool:
        """Whether reading can go on where it was left."""
        position = self._positions.get(shard)
        return position is not None and await self._store.covers(shard, position)

    def _back(self, now: float) -> None:
        away_s = now - (self._away_at or now)
        self.state, self.reason, self._away_at, self._joined_at = StoreState.CONNECTED, "", None, now
        log.info("store_connected", store=self.kind, gateway=self.member, away_s=round(away_s, 3))

    def _lost(self, reason: str) -> None:
        """Said once: failures to join again say nothing new."""
        self.outbox.lose()
        self.reason = reason
        if self.state is not StoreState.AWAY:
            self.state = StoreState.AWAY
            self.away_count += 1
            self._away_at = self._away_at or self._driver.now()
            log.warning(
                "store_away", store=self.kind, reason=reason, consequence="each gateway decides by its own view"
            )

    async def _leave(self) -> None:
        """Says goodbye, if anybody can hear it."""
        with contextlib.suppress(StoreUnavailable):
            if self.state is StoreState.CONNECTED:
                now = self._driver.now()
                self.outbox.say_goodbye(now=now)
                await self._send(now)
                for engine_id in self._listening:
                    await self._store.release(_listen_lease(engine_id), self.member)
        await self._store.close()

    # ---- publish ----------------------------------------------------------------------------------------------------

    async def _publish(self) -> None:
        while True:
            await self._has_mail.wait()
            await asyncio.sleep(self._limits.flush_s)
            self._has_mail.clear()
            now = self._driver.now()
            if self._is_asked:
                self._is_asked = False
                self.outbox.restate(now=now)
            await self._send(now)

    async def _send(self, now: float) -> None:
        for letter in self.outbox.take(now=now):
            await self._store.append(letter.shard, encode(letter.message))

    # ---- follow -----------------------------------------------------------------------------------------------------

    async def _follow(self, shard: int) -> None:
        while True:
            entries = await self._store.read(shard, self._positions[shard], wait_s=READ_WAIT_S)
            events: list[Event] = []
            for position, data in entries:
                events += self.follower.take(shard, data)
                self._positions[shard] = position
                if len(events) >= TURN_EVENTS:
                    self._apply(events)
                    events = []
                    await asyncio.sleep(0)
            self._apply(events)
            self._answer_wishes()
            if entries:
                await asyncio.sleep(self._limits.flush_s)

    def _apply(self, events: list[Event]) -> None:
        if not events:
            return
        self._driver.follow(events)
        leases, now = self._driver.scheduler.leases, self._driver.now()
        for event in events:
            if isinstance(event, PeerHolds):
                self._look_for_twin(event.owner, now)
                if leases.missing_from(event.owner):
                    self._ask(event.owner, wants_blocks=False, now=now)

    def _answer_wishes(self) -> None:
        wishes, now = self.follower.take_wishes(), self._driver.now()
        for member in sorted(wishes.ask):
            self._ask(member, wants_blocks=wishes.wants_blocks, now=now)
        if wishes.is_asked:
            self._is_asked = True
            self._has_mail.set()
        self._is_asked_blocks |= wishes.is_asked_blocks
        counts = self.follower.counts
        faults = counts.malformed + counts.unknown_versions
        if faults and not self._told_faults:
            log.warning("store_message_skipped", reason=self.follower.last_fault)
        self._told_faults = faults

    def _ask(self, member: str, *, wants_blocks: bool, now: float) -> None:
        """Asks one member again, not more often than it can answer."""
        if now - self._asked_at.get(member, -ASK_EVERY_S) < ASK_EVERY_S:
            return
        self._asked_at = {name: at for name, at in self._asked_at.items() if now - at < ASK_EVERY_S}
        self._asked_at[member] = now
        self.outbox.ask(member, wants_blocks=wants_blocks, now=now)
        self._has_mail.set()

    def _look_for_twin(self, owner: str, now: float) -> None:
        """Another living gateway of our name is counted as what it is, another; but somebody should know."""
        is_twin = owner.rpartition("~")[0] == self.gateway_id
        if is_twin and not self._has_warned_of_twin and now - self._joined_at > self._limits.lease_s:
            self._has_warned_of_twin = True
            log.warning("store_same_id", gateway_id=self.gateway_id, other=owner, consequence="they count as two")

    # ---- tend -------------------------------------------------------------------------------------------------------

    async def _tend(self) -> None:
        limits, loop = self._limits, asyncio.get_running_loop()
        step_s = min(limits.lease_s / RENEWALS_PER_LEASE, LISTEN_LEASE_S / LISTEN_TRIES_PER_LEASE)
        renew_at = 0.0
        snapshot_at = loop.time() + min(1.0, limits.snapshot_interval_s)
        while True:
            await asyncio.sleep(step_s)
            if loop.time() >= renew_at:
                self.outbox.renew(now=self._driver.now())
                self._has_mail.set()
                renew_at = loop.time() + limits.lease_s / RENEWALS_PER_LEASE
            await self._try_to_listen()
            if self._is_asked_blocks or self.outbox.has_lost_blocks:
                self._is_asked_blocks = False
                await self._restate_blocks(tuple(self._listening))
            if loop.time() >= snapshot_at:
                await self._write_snapshot()
                snapshot_at = loop.time() + limits.snapshot_interval_s

    async def _try_to_listen(self) -> None:
        """Takes or keeps the lease of every engine that one gateway may follow for all."""
        if not self._limits.is_listening_shared:
            return
        names = list(self.shareable())
        leases = (self._store.acquire(_listen_lease(name), self.member, ttl_s=LISTEN_LEASE_S) for name in names)
        tokens = await asyncio.gather(*leases)
        anew: list[str] = []
        for name, token in zip(names, tokens, strict=True):
            before = self._listening.pop(name, None)
            self.outbox.listens(name, token)
            if token is not None:
                self._listening[name] = token
                if token != before and self.is_subscribed(name):
                    anew.append(name)
        await self._restate_blocks(anew)

    async def _restate_blocks(self, engine_ids: Iterable[str]) -> None:
        """Tells anew what the engines hold that this gateway listens to, a stretch of the index at a time."""
        prefixes, now = self._driver.scheduler.prefixes, self._driver.now
        rows = {row: name for name in engine_ids for row in prefixes.rows(name)}
        feeds = [feed for feed in prefixes.feeds() if feed.engine_id in rows.values()]
        self.outbox.begin_blocks()
        self.outbox.restate_blocks([*feeds, *map(BlocksCleared, rows)], now=now())
        if not rows:
            return
        for first in range(0, prefixes.index.bucket_count, snapshot.STRETCH_BUCKETS):
            told = self._stored(prefixes.index.held_in(first, snapshot.STRETCH_BUCKETS), rows)
            self.outbox.restate_blocks(told, now=now())
            self._has_mail.set()
            await asyncio.sleep(self._limits.flush_s if len(self.outbox) > RESTATED_EVENTS else 0)

    def _stored(
        self, held: Iterable[tuple[tuple[tuple[str, Tier], ...], BlockHashes]], rows: dict[str, str]
    ) -> Iterator[BlocksStored]:
        for holders, hashes in held:
            for row, tier in holders:
                if row in rows:
                    engine = self._driver.engine(rows[row])
                    yield BlocksStored(row, (engine.block_tokens if engine else None) or 0, hashes, tier)

    # ---- snapshots --------------------------------------------------------------------------------------------------

    async def _write_snapshot(self) -> None:
        """Writes the snapshot, if it is this gateway's turn."""
        ttl_s = 1.5 * self._limits.snapshot_interval_s
        if await self._store.acquire("snapshot", self.member, ttl_s=ttl_s) is None:
            return
        positions = tuple(self._positions[shard] for shard in range(self._limits.shard_count))
        tokens = {name: feed.token for name, feed in self.follower.feeds.items()} | self._listening
        parts = [snapshot.head_of(self._driver.scheduler, positions, tokens)]
        for part in snapshot.stretches(self._driver.scheduler.prefixes):
            parts.append(part)
            await asyncio.sleep(0)
        await self._store.save_snapshot(parts)

    async def _warm_up(self) -> bool:
        """Takes over the others' snapshot, and reads on from where it was begun; whether there was one to rely on."""
        parts = await self._store.load_snapshot()
        if not parts:
            return False
        await self._engines_known()
        try:
            head = snapshot.read_head(parts[0])
            events = [event for event in snapshot.facts_of(head, self._driver.scheduler) if self._is_followed(event)]
            self._driver.follow(events)
            for part in parts[1:]:
                count = snapshot.restore(part, self._driver.scheduler.prefixes, now=self._driver.now())
                self.snapshot_blocks += count
                await asyncio.sleep(0)
        except MalformedMessage as error:
            log.warning("store_snapshot_skipped", reason=error.message)
            return False
        shards = range(self._limits.shard_count)
        if len(head.positions) != len(shards):
            return False
        is_whole = all([await self._store.covers(shard, head.positions[shard]) for shard in shards])
        if is_whole:
            self._positions = dict(enumerate(head.positions))
        log.info("store_snapshot_taken_over", blocks=self.snapshot_blocks, is_whole=is_whole)
        return is_whole

    async def _engines_known(self) -> None:
        until_at = self._driver.now() + ENGINES_WAIT_S
        cluster = self._driver.scheduler.cluster
        while not cluster.engines and self._driver.now() < until_at:  # noqa: ASYNC110 - nobody tells of the first one
            await asyncio.sleep(self._limits.flush_s)

    def _is_followed(self, event: Event) -> bool:
        return not isinstance(event, KvFeed) or self._follows_blocks(event.engine_id)

    def _follows_blocks(self, engine_id: str) -> bool:
        """Whether the engine's blocks are heard from others: one's own ears win."""
        return self._limits.is_listening_shared and not self.is_subscribed(engine_id)


def _listen_lease(engine_id: str) -> str:
    return f"listen/{engine_id}"
