"""How long one step of an engine takes: a Protocol, and linear times from a GPU's data sheet.

A step is one forward pass over the weights: prompt chunks and decoding requests share it. Its fixed cost (reading the
weights, launching kernels) is therefore paid once, however many parts the step has; the fixed cost of a part is what
the smallest such part costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class StepTimes(Protocol):
    """Seconds of the two kinds of work. Both must be > 0 and monotone in every argument."""

    def prefill_s(self, new_tokens: int, cached_tokens: int) -> float:
        """Seconds of a step that computes `new_tokens` >= 1 prompt tokens after `cached_tokens` >= 0 with KV."""
        ...

    def decode_s(self, batch: int, kv_tokens: int) -> float:
        """Seconds of a step that gives each of `batch` >= 1 requests a token, `kv_tokens` in all having KV."""
        ...


@dataclass(frozen=True, slots=True)
class LinearStepTimes:
    """Step times affine in tokens, plus the attention of each new token over the tokens before it.

    The defaults are arithmetic for an 8e9-parameter bf16 model with 32 layers, hidden size 4096 and 128 KiB of KV per
    token on a GPU with 3.35e12 B/s and 9.9e14 flop/s (the H100 SXM data sheet), half of the flops reached: weights
    16e9 B / 3.35e12; a prompt token 2 * 8e9 flop; a token pair of attention 4 * 32 * 4096 flop; a KV token
    131072 B / 3.35e12. A batched request adds a microsecond-scale share for sampling.
    """

    fixed_s: float = 4.8e-3
    token_s: float = 3.2e-5
    pair_s: float = 1.06e-9
    request_s: float = 2e-5
    kv_token_s: float = 3.9e-8

    def prefill_s(self, new_tokens: int, cached_tokens: int) -> float:
        """Seconds of a step over one prompt chunk."""
        pairs = new_tokens * (cached_tokens + new_tokens / 2)
        return self.fixed_s + new_tokens * self.token_s + pairs * self.pair_s

    def decode_s(self, batch: int, kv_tokens: int) -> float:
        """Seconds of a step over a decoding batch."""
        return self.fixed_s + batch * self.request_s + kv_tokens * self.kv_token_s


def mixed_step_s(times: StepTimes, chunks: Sequence[tuple[int, int]], batch: int, kv_tokens: int) -> float:
    """Seconds of one step over prompt chunks `(new_tokens, cached_tokens)` and `batch` decoding requests.

    The parts add up, less the fixed cost of every part but one; never less than the longest part alone.
    """
    parts = [times.prefill_s(new, cached) for new, cached in chunks]
    shared_s = len(parts) * times.prefill_s(1, 0)
    if batch:
        parts.append(times.decode_s(batch, kv_tokens))
        shared_s += times.decode_s(1, 0)
    if len(parts) == 1:
        return parts[0]
    once_s = times.prefill_s(1, 0) if chunks else times.decode_s(1, 0)
    return max(*parts, sum(parts) - shared_s + once_s)
