"""What can be wrong with an emulated engine. Tests set these fields while it runs; the defaults are health."""

from __future__ import annotations

from dataclasses import dataclass

from loadtest.step_times import StepTimes


@dataclass(slots=True)
class Faults:
    """The misbehaviour of one emulated engine over HTTP."""

    is_silent: bool = False
    """Accepts connections and requests, and never answers any."""
    is_silent_to_posts: bool = False
    """The same, but its probes are answered: only those who ask for something wait."""
    garbage: bytes | None = None
    """Answers every request with these bytes instead of HTTP, then closes."""
    errors_left: int = 0
    """Answers the next that many generation requests with 500."""
    error_after_tokens: int | None = None
    """Sends an SSE error event under HTTP 200 once a stream has that many tokens."""
    drop_after_tokens: int | None = None
    """Drops the connection once a stream has that many tokens."""
    omits_kv_params: bool = False
    """Answers prefill legs without kv_transfer_params, and holds no KV."""


@dataclass(slots=True)
class ScaledTimes:
    """The step times of an engine that is `factor` times slower than it should be."""

    times: StepTimes
    factor: float = 1.0

    def prefill_s(self, new_tokens: int, cached_tokens: int) -> float:
        """Seconds of a step over one prompt chunk."""
        return self.factor * self.times.prefill_s(new_tokens, cached_tokens)

    def decode_s(self, batch: int, kv_tokens: int) -> float:
        """Seconds of a step over a decoding batch."""
        return self.factor * self.times.decode_s(batch, kv_tokens)
