"""One sequence inside an emulated engine: how far its KV is computed, what it said, and the run of steps it is in."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from loadtest.engine_types import EngineRequest, EngineSettings, FinishReason
from loadtest.kv_cache import KvCache
from loadtest.kv_content import block_keys, fold, is_last, next_token, read_states, root_state


@dataclass(slots=True, eq=False)
class Sequence:
    """A request on its way. Known tokens = prompt + output; `computed` of them have KV in `blocks`."""

    request: EngineRequest
    arrived_at: float
    keys: list[int]
    """Chained keys of the known full blocks."""
    tokens: list[int]
    """Prompt and output token ids; empty when only sizes are known."""
    limit: int | None
    """Output tokens at which it ends; None until the first token tells."""
    computed: int = 0
    output: int = 0
    blocks: list[int] = field(default_factory=list)
    published: int = 0
    cached_tokens: int = 0
    """Prompt tokens the local prefix cache supplied at the first scheduling."""
    fetched_tokens: int = 0
    """Prompt tokens that came from another engine."""
    preemptions: int = 0
    scheduled_at: float | None = None
    first_token_at: float | None = None
    fetch_started_at: float | None = None
    is_fetch_over: bool = False
    is_aborted: bool = False
    limit_reason: FinishReason = FinishReason.LENGTH
    state: int = 0
    """What the memory of its prompt and output says, where tokens are known."""

    @classmethod
    def of(cls, request: EngineRequest, settings: EngineSettings, *, now: float) -> Sequence:
        """A sequence that has just arrived."""
        ids = request.token_ids
        keys = list(request.block_keys)
        if ids:
            keys = list(block_keys(ids, settings.block_tokens, lora=request.lora, salt=request.salt))
        return cls(request, now, keys, list(ids), None if ids else request.max_tokens)

    @property
    def known_tokens(self) -> int:
        """Prompt and output tokens so far."""
        return self.request.prompt_tokens + self.output

    @property
    def remaining(self) -> int:
        """Known tokens without KV; 1 means it decodes, more that it is in prefill."""
        return self.request.prompt_tokens + self.output - self.computed

    @property
    def is_only_counted(self) -> bool:
        """Whether further tokens change nothing but counts: it has spoken, without text, and published its prompt."""
        return self.first_token_at is not None and not self.tokens and self.published == len(self.keys)

    def write(self, cache: KvCache, end: int) -> None:
        """Computes KV up to token `end`: fills block memory and makes full blocks findable."""
        if self.tokens:
            self._fill(cache, end)
        self.computed = end
        self.publish(cache)

    def _fill(self, cache: KvCache, end: int) -> None:
        size = cache.block_tokens
        for index in range(self.computed // size, (end - 1) // size + 1):
            block = cache.content(self.blocks[index])
            if block.filled == 0:
                block.entry = block.exit = self._state_before(cache, index)
            start, stop = index * size + block.filled, min(end, (index + 1) * size)
            if start < stop:
                block.exit = fold(block.exit, self.tokens[start:stop])
                block.filled = stop - index * size

    def _state_before(self, cache: KvCache, index: int) -> int:
        return cache.content(self.blocks[index - 1]).exit if index else root_state(self.request.lora)

    def publish(self, cache: KvCache) -> None:
        """Enters the full computed blocks that are new into the prefix cache."""
        size = cache.block_tokens
        full = self.computed // size
        if full <= self.published:
            return
        if self.tokens and full > len(self.keys):
            self._extend_keys(size, full)
        full = min(full, len(self.keys))
        if full > self.published:
            first = self.published
            cache.publish(
                self.blocks[first:full],
                self.keys[first:full],
                parent=self.keys[first - 1] if first else None,
                token_ids=self.tokens[first * size : full * size],
                lora=self.request.lora,
                salt=self.request.salt if first == 0 else "",
            )
            self.published = full

    def _extend_keys(self, size: int, full: int) -> None:
        known = len(self.keys)
        tail = self.tokens[known * size : full * size]
        parent = self.keys[-1] if self.keys else None
        self.keys += block_keys(tail, size, parent=parent, lora=self.request.lora, salt=self.request.salt)

    def speak(self, cache: KvCache, settings: EngineSettings, count: int) -> tuple[int, ...]:
        """Produces `count` output tokens; their ids where tokens are known, else ()."""
        self.output += count
        if not self.tokens:
            return ()
        if self.limit is None:
            self._begin(cache, settings)
        said = []
        for _ in range(count):
            said.append(next_token(self.state, self.request.variant, settings.vocabulary))
            self.state = fold(self.state, said[-1:])
        self.tokens += said
        return tuple(said)

    def _begin(self, cache: KvCache, settings: EngineSettings) -> None:
        """Reads the prompt's KV as memory holds it: that, not the request's text, decides what is said."""
        prompt_blocks = math.ceil(self.request.prompt_tokens / cache.block_tokens)
        contents = [cache.content(block) for block in self.blocks[:prompt_blocks]]
        self.state = read_states(root_state(self.request.lora), contents)
        self.limit = self.request.max_tokens
        stop_at = None if self.request.is_eos_ignored else self._last_token(settings)
        if stop_at is not None:
            self.limit, self.limit_reason = stop_at, FinishReason.STOP

    def _last_token(self, settings: EngineSettings) -> int | None:
        """How many tokens the text has by itself; None when it is at least as long as it may be."""
        state, variant = self.state, self.request.variant
        for count in range(1, self.request.max_tokens):
            state = fold(state, (next_token(state, variant, settings.vocabulary),))
            if count >= self.request.min_tokens and is_last(state, variant, settings.mean_output_tokens):
                return count
        return None


@dataclass(slots=True)
class Run:
    """One or more equal steps under way: the first takes `first_s`, each next one `growth_s` more."""

    started_at: float
    chunks: list[tuple[Sequence, int]]
    decodes: list[Sequence]
    steps: int
    first_s: float
    growth_s: float = 0.0

    @property
    def ends_at(self) -> float:
        """The instant the last step ends."""
        return self.started_at + self.elapsed_s(self.steps)

    def elapsed_s(self, steps: int) -> float:
        """Seconds that the first `steps` steps take."""
        return steps * self.first_s + self.growth_s * steps * (steps - 1) / 2

    def token_at(self) -> NDArray[np.float64]:
        """The instants the steps end, shape (steps,)."""
        n = np.arange(1, self.steps + 1, dtype=np.float64)
        return self.started_at + n * self.first_s + self.growth_s * n * (n - 1) / 2

    def cut(self, now: float) -> None:
        """Ends the run with the step that is under way at `now`, so that the batch can change."""
        low, high = 1, self.steps
        while low < high:
            middle = (low + high) // 2
            if self.started_at + self.elapsed_s(middle) >= now:
                high = middle
            else:
                low = middle + 1
        self.steps = low
