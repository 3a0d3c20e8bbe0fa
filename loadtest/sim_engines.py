"""The engines of a simulation: the engine model, and what the world gets to see of it (facts, reports, KV blocks)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gateway.core import blocks
from gateway.core.errors import ConfigError
from gateway.core.events import BlocksCleared, BlocksRemoved, BlocksStored
from gateway.core.types import BlockHashes, Engine, Report, Role
from loadtest.engine import Engine as EngineModel
from loadtest.engine_faults import ScaledTimes
from loadtest.engine_types import EngineSettings
from loadtest.kv_cache import BlockRemoved, BlockStored
from loadtest.links import Links
from loadtest.step_times import StepTimes
from predictors.profile import Profile

if TYPE_CHECKING:
    from loadtest.flight import Flight

MODEL = "model"
PROGRESS_TOKENS = 32
"""Tokens between two words to the scheduler about a stream, as in gateway/relay.py."""
CHUNK_TOKENS = 8192
"""Budget of a step that decodes too, where the profile names none: a whole prompt would hold up every stream."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """How many engines there are of each role, on what hardware."""

    profile: Profile
    prefill: int = 0
    decode: int = 0
    both: int = 0
    noise_sigma: float = 0.0
    """Standard deviation of the logarithm of prefill times around the profile's, >= 0."""
    block_tokens: int = 512
    can_share_prefixes: bool = True

    def __post_init__(self) -> None:
        if min(self.prefill, self.decode, self.both) < 0 or not 0 <= self.noise_sigma <= 5:
            raise ConfigError("simulation: engine counts must be >= 0 and the noise between 0 and 5")
        if self.both == 0 and min(self.prefill, self.decode) == 0:
            raise ConfigError("simulation: needs prefill and decode engines, or engines that do both")

    @property
    def engine_ids(self) -> list[str]:
        """p1, p2 ..., d1, d2 ..., e1, e2 ...; numbers are padded so that their order is that of the text."""
        counts = (("p", self.prefill), ("d", self.decode), ("e", self.both))
        return [f"{letter}{n:0{len(str(count))}}" for letter, count in counts for n in range(1, count + 1)]


class NoisyTimes:
    """Step times whose prefills take a lognormal factor longer or shorter; the median is the profile's time."""

    def __init__(self, times: StepTimes, sigma: float, rng: random.Random) -> None:
        self._times = times
        self._sigma = sigma
        self._rng = rng

    def prefill_s(self, new_tokens: int, cached_tokens: int) -> float:
        """Seconds of a step over one prompt chunk, drawn anew each time."""
        return self._times.prefill_s(new_tokens, cached_tokens) * self._rng.lognormvariate(0.0, self._sigma)

    def decode_s(self, batch: int, kv_tokens: int) -> float:
        """Seconds of a step over a decoding batch."""
        return self._times.decode_s(batch, kv_tokens)


def prefix_hashes(block_ids: tuple[int, ...]) -> BlockHashes:
    """Our names of a trace's blocks, shape (blocks,). Equal ids at the start, and only those, give equal names."""
    return blocks.chain(blocks.root(1), np.array(block_ids, dtype=np.int64), 1)


class SimEngine:
    """One engine of a simulation. A dead one has no `model`."""

    def __init__(self, engine_id: str, fleet: Fleet, links: Links, *, seed: int) -> None:
        self.id = engine_id
        self.role = {"p": Role.PREFILL, "d": Role.DECODE, "e": Role.BOTH}[engine_id[0]]
        self.is_silent = False
        self.lie_factor = 1.0
        self.legs: dict[str, Flight] = {}
        """The requests that it has, by the id of their leg."""
        self.busy_s = 0.0
        """Of models that are dead; see `total_busy_s`."""
        self._links = links
        self._settings = settings_of(self.role, fleet)
        noise = NoisyTimes(fleet.profile, fleet.noise_sigma, random.Random(f"{engine_id} {seed}"))
        self.times = ScaledTimes(noise if fleet.noise_sigma > 0 else fleet.profile)
        self.facts = Engine(
            id=engine_id,
            url=f"http://{engine_id}",
            role=self.role,
            can_share_prefixes=fleet.can_share_prefixes and self.role is Role.PREFILL,
            models=(MODEL,),
            block_tokens=fleet.block_tokens,
            kv_capacity_tokens=self._settings.kv_blocks * fleet.block_tokens,
            max_model_tokens=self._settings.max_model_tokens,
        )
        self.model: EngineModel | None = None
        self.start()

    def start(self) -> None:
        """A fresh model with empty memory, reachable over the links."""
        self.model = EngineModel(self.id, self._settings, self.times, self._links)
        self._links.attach(self.model, self.id, 0)

    def die(self) -> None:
        """Everything it held is gone."""
        if self.model is not None:
            self.busy_s += self.model.counters.busy_s
        self.model = None
        self._links.detach(self.id, 0)

    @property
    def total_busy_s(self) -> float:
        """Seconds in which it was computing steps."""
        return self.busy_s + (0.0 if self.model is None else self.model.counters.busy_s)

    def report(self) -> Report | None:
        """What it says of itself now; None when it says nothing."""
        if self.model is None or self.is_silent:
            return None
        load, counters = self.model.load(), self.model.counters
        return Report(
            running_count=round(load.running_count * self.lie_factor),
            waiting_count=round((load.waiting_count + load.deferred_count) * self.lie_factor),
            kv_usage_ratio=min(1.0, load.kv_usage_ratio * self.lie_factor),
            prefix_hit_tokens=counters.prefix_hit_tokens,
            prefix_query_tokens=counters.prefix_query_tokens,
            preemptions=counters.preemptions,
        )

    def take_block_events(self) -> Iterator[BlocksStored | BlocksRemoved | BlocksCleared]:
        """The changes of its prefix cache since the last call, neighbours of one kind as one event."""
        if self.model is None or not self._settings.has_kv_events:
            return
        removed: list[int] = []
        for event in self.model.take_kv_events():
            if isinstance(event, BlockRemoved):
                removed.append(event.block_hash)
                continue
            if removed:
                yield self._removed(removed)
                removed = []
            if isinstance(event, BlockStored):
                hashes = np.array(event.block_hashes, dtype=np.uint64)
                yield BlocksStored(self.id, event.block_tokens, hashes)
            else:
                yield BlocksCleared(self.id)
        if removed:
            yield self._removed(removed)

    def _removed(self, keys: list[int]) -> BlocksRemoved:
        return BlocksRemoved(self.id, self._settings.block_tokens, np.array(keys, dtype=np.uint64))


def settings_of(role: Role, fleet: Fleet) -> EngineSettings:
    """How an engine of that role is started on that hardware.

    A prefill engine keeps its prefix cache in host memory too; without a chunk budget it computes prompts one by one.
    """
    profile, size = fleet.profile, fleet.block_tokens
    is_prefill, is_whole = role is Role.PREFILL, fleet.profile.chunk_tokens is None
    kv_blocks = (profile.prefix_cache_tokens if is_prefill else profile.kv_capacity_tokens) // size
    max_model_tokens = min(profile.prefix_cache_tokens, profile.kv_capacity_tokens) // size * size
    return EngineSettings(
        role=role,
        block_tokens=size,
        kv_blocks=kv_blocks,
        step_tokens=max_model_tokens if is_prefill and is_whole else profile.chunk_tokens or CHUNK_TOKENS,
        batch_limit=1 if is_prefill and is_whole else 256,
        max_model_tokens=max_model_tokens,
        kv_token_bytes=round(profile.kv_bytes_per_token),
        has_kv_events=True,
        max_run_steps=PROGRESS_TOKENS,
    )
