"""How small and how fast the prefix index is, and what limits it: `main(["--json"])`, or a table for people.

Every figure is measured on one core in this process. Latencies are wall time with caches swept by 64 MB of other data
before each sample (a gateway does other things between two requests); the same without the sweep shows how much of it
is waiting for memory. Throughputs are CPU time of the process, so a busy neighbour costs them less.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import numpy as np

from adapters.kv_stream import KvEventStream
from gateway.core.blocks import hash_prompt
from gateway.core.index import PrefixIndex
from gateway.core.types import BlockHashes

_PROMPT_BLOCKS = 8192
_BLOCK_TOKENS = 16
_EVENT_BLOCKS = 512
_SHARED_PROMPTS = 4
_SAMPLES = 40
_SWEPT_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Figure:
    """One measurement beside its goal."""

    name: str
    value: float
    unit: str
    goal: float | None
    is_lower_better: bool
    limited_by: str

    @property
    def is_met(self) -> bool | None:
        """Whether the goal was reached; None without a goal."""
        if self.goal is None:
            return None
        return self.value <= self.goal if self.is_lower_better else self.value >= self.goal


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark and prints it: 0 when every goal was met, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="sluice bench index", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--blocks", type=int, default=10_000_000, help="blocks in the index (default 10 million)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(argv)
    figures = list(measure(options.blocks, options.seed))
    print(render_json(figures, options.blocks) if options.json else render(figures, options.blocks))
    return 1 if any(figure.is_met is False for figure in figures) else 0


def measure(
    blocks: int, seed: int, *, few_engines: int = 64, many_engines: int = 1000, ingested_blocks: int = 200_000
) -> Iterator[Figure]:
    """All figures for an index of that many blocks (at least as many as the shared prompts have)."""
    rng = np.random.default_rng(seed)
    keys = rng.integers(1, 2**64, max(blocks, 2 * _SHARED_PROMPTS * _PROMPT_BLOCKS), dtype=np.uint64)
    before = _resident_bytes()
    index = PrefixIndex(max_blocks=len(keys))
    stored_per_s = _fill(index, keys, engine_count=few_engines)
    yield from _figures_of_size(index, len(keys), _resident_bytes() - before)
    _share(index, keys, rng)
    yield from _figures_of_matching(index, keys, goal_us=300.0)
    yield Figure("store", stored_per_s, "blocks/s", None, False, f"memory latency, {_EVENT_BLOCKS} blocks per call")
    yield _figure_of_clearing(index)
    yield from _figures_when_full(index, rng)
    del index
    many = PrefixIndex(max_blocks=len(keys))
    _fill(many, keys, engine_count=many_engines)
    _share(many, keys, rng)
    yield from _figures_of_matching(many, keys, goal_us=3000.0)
    del many, keys
    yield from _figures_of_ingestion(rng, ingested_blocks)
    yield _figure_of_hashing(rng)


def render_json(figures: list[Figure], blocks: int) -> str:
    """One JSON object for programs."""
    rows = [{**asdict(figure), "is_met": figure.is_met} for figure in figures]
    return json.dumps({"blocks": blocks, "prompt_blocks": _PROMPT_BLOCKS, "figures": rows}, indent=2)


def render(figures: list[Figure], blocks: int) -> str:
    """A table for people."""
    lines = [f"Prefix index with {blocks:,} blocks; prompts of {_PROMPT_BLOCKS:,} blocks", ""]
    for figure in figures:
        goal = "" if figure.goal is None else f"{'<=' if figure.is_lower_better else '>='} {figure.goal:,.0f}"
        mark = {True: "ok", False: "MISSED", None: ""}[figure.is_met]
        lines.append(
            f"{figure.name:<52}{figure.value:>12,.1f} {figure.unit:<12}{goal:>11} {mark:<7}{figure.limited_by}"
        )
    return "\n".join(lines)


def _engine(number: int) -> str:
    return f"engine-{number:04}"


def _fill(index: PrefixIndex, keys: BlockHashes, *, engine_count: int) -> float:
    """Adds the engines and spreads the blocks over them; blocks stored per second."""
    for number in range(engine_count):
        index.add_engine(_engine(number))
    started = time.process_time()
    for turn, first in enumerate(range(0, len(keys), _EVENT_BLOCKS)):
        index.store(_engine(turn % engine_count), keys[first : first + _EVENT_BLOCKS])
    return len(keys) / (time.process_time() - started)


def _share(index: PrefixIndex, keys: BlockHashes, rng: np.random.Generator) -> None:
    """Lets every engine hold the first prompts up to a depth of its own: as many distinct sets as engines."""
    engine_ids = index.match({}).engine_ids
    for prompt in _prompts(keys, _SHARED_PROMPTS):
        for engine_id, depth in zip(engine_ids, rng.integers(0, len(prompt) + 1, len(engine_ids)), strict=True):
            index.store(engine_id, prompt[:depth])


def _prompts(keys: BlockHashes, count: int) -> list[BlockHashes]:
    return [keys[n * _PROMPT_BLOCKS : (n + 1) * _PROMPT_BLOCKS] for n in range(count)]


def _figures_of_size(index: PrefixIndex, blocks: int, resident_bytes: int) -> Iterator[Figure]:
    yield Figure(
        "memory, resident",
        resident_bytes / blocks,
        "bytes/block",
        40.0,
        True,
        "16 bytes of key and word at 55 % load, 2 of counts",
    )
    yield Figure("memory, allocated", index.allocated_bytes / blocks, "bytes/block", 40.0, True, "fixed at start")


def _figures_of_matching(index: PrefixIndex, keys: BlockHashes, *, goal_us: float) -> Iterator[Figure]:
    engine_count = len(index.match({}).engine_ids)
    shared = _prompts(keys, _SHARED_PROMPTS)
    swept = np.zeros(_SWEPT_BYTES // 8, np.int64)
    cold = _median_us(lambda n: index.match({_BLOCK_TOKENS: shared[n % len(shared)]}), prepare=lambda: swept.sum())
    warm = _median_us(lambda n: index.match({_BLOCK_TOKENS: shared[0]}))
    yield Figure(
        f"match, {engine_count} engines, each to a depth of its own",
        cold,
        "us",
        goal_us,
        True,
        f"cache misses; {warm:.0f} us with the prompt's entries in the cache",
    )
    absent = keys[:_PROMPT_BLOCKS] ^ np.uint64(1)
    unknown = _median_us(lambda n: index.match({_BLOCK_TOKENS: absent}), prepare=lambda: swept.sum())
    yield Figure(f"match, {engine_count} engines, nothing cached", unknown, "us", None, True, "numpy calls")


def _figure_of_clearing(index: PrefixIndex) -> Figure:
    started = time.perf_counter()
    index.clear(_engine(0))
    elapsed = time.perf_counter() - started
    return Figure("forgetting one engine's blocks", elapsed * 1e6, "us", None, True, f"{index.set_count:,} sets")


def _figures_when_full(index: PrefixIndex, rng: np.random.Generator) -> Iterator[Figure]:
    """Storing new blocks into a full index: each drops an old one."""
    new = rng.integers(1, 2**64, min(index.max_blocks, 500_000), dtype=np.uint64)
    longest = 0.0
    started = time.process_time()
    for first in range(0, len(new), _EVENT_BLOCKS):
        step = time.process_time()
        index.store(_engine(1), new[first : first + _EVENT_BLOCKS])
        longest = max(longest, time.process_time() - step)
    rate = len(new) / (time.process_time() - started)
    yield Figure("store when full", rate, "blocks/s", None, False, "the sweep for blocks to drop")
    yield Figure("longest store when full", longest * 1e6, "us", None, True, "no rehash: the table never grows")


def _figures_of_ingestion(rng: np.random.Generator, ingested_blocks: int) -> Iterator[Figure]:
    """From the bytes of an engine's messages to the index, tokens hashed on the way."""
    for events, blocks, goal in ((1, 512, 500_000.0), (16, 16, None), (16, 1, None)):
        messages = list(_messages(rng, events, blocks, count=max(4, ingested_blocks // (events * blocks))))
        index = PrefixIndex(max_blocks=1_000_000)
        index.add_engine("e")
        stream = KvEventStream("e", max_blocks=1_000_000, can_replay=True)
        started = time.process_time()
        for number, frames in enumerate(messages):
            stream.live(frames)
            if number % 64 == 63 or number == len(messages) - 1:
                for event in stream.take():
                    index.apply(event)
        rate = len(messages) * events * blocks / (time.process_time() - started)
        name = f"ingestion from bytes, {events} x {blocks} blocks a message"
        limit = "msgpack and Python ints" if blocks > 1 else "Python steps per event"
        yield Figure(name, rate, "blocks/s", goal, False, limit)


def _messages(rng: np.random.Generator, events: int, blocks: int, *, count: int) -> Iterator[list[bytes]]:
    """vLLM messages that store chains of new blocks."""
    parent: int | None = None
    for number in range(count):
        batch = []
        for _ in range(events):
            hashes = rng.integers(1, 2**63, blocks).tolist()
            tokens = rng.integers(0, 150_000, blocks * _BLOCK_TOKENS).tolist()
            batch.append(
                {
                    "type": "BlockStored",
                    "block_hashes": hashes,
                    "parent_block_hash": parent,
                    "token_ids": tokens,
                    "block_size": _BLOCK_TOKENS,
                    "lora_id": None,
                    "medium": "GPU",
                    "lora_name": None,
                }
            )
            parent = hashes[-1]
        yield [b"", number.to_bytes(8, "big"), msgspec.msgpack.encode([0.0, batch, 0])]


def _figure_of_hashing(rng: np.random.Generator) -> Figure:
    tokens = rng.integers(0, 150_000, _PROMPT_BLOCKS * _BLOCK_TOKENS)
    elapsed = _median_us(lambda n: hash_prompt(tokens, _BLOCK_TOKENS))
    return Figure(f"hashing a prompt of {len(tokens):,} tokens", elapsed, "us", None, True, "five numpy passes")


def _median_us(call: Callable[[int], object], prepare: Callable[[], object] = lambda: None) -> float:
    """Median wall time of `call(n)`, in microseconds, after `prepare()` each time."""
    samples = []
    for number in range(_SAMPLES):
        prepare()
        started = time.perf_counter()
        call(number)
        samples.append(time.perf_counter() - started)
    return statistics.median(samples) * 1e6


def _resident_bytes() -> int:
    """Memory of this process that is in RAM. Linux only."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


if __name__ == "__main__":
    raise SystemExit(main())
