"""How many tokens a prompt has when nobody can tell: its characters over a ratio learnt from answered requests."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

FIRST_RATIO = 4.0
"""Characters per token before anything is learnt: English prose under vocabularies of 32 to 128 thousand entries."""

LOWEST_RATIO, HIGHEST_RATIO = 0.25, 16.0
"""Bounds of what one answer may teach: an emoji is up to four byte tokens, a run of spaces one token for many."""

_MEMORY_TOKENS = 50_000.0
"""Tokens over which older answers fade: some tens of requests, so that a change of use shows within minutes."""

_PRIOR_TOKENS = 500.0
"""Weight of FIRST_RATIO, in tokens: one ordinary answer moves the ratio, one tiny answer hardly does."""

_MODELS = 256
"""Most models with a ratio of their own; the one not heard of for longest goes first."""


class TokenRatios:
    """Characters per prompt token for each model."""

    def __init__(self) -> None:
        self._sums: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def ratio(self, model: str) -> float:
        """Characters per token, LOWEST_RATIO <= ratio <= HIGHEST_RATIO; FIRST_RATIO for a model not heard of."""
        chars, tokens = self._sums.get(model, (FIRST_RATIO * _PRIOR_TOKENS, _PRIOR_TOKENS))
        return chars / tokens

    def count(self, model: str, chars: int) -> int:
        """Estimated tokens of a prompt with that many characters, >= 1."""
        return max(1, round(chars / self.ratio(model)))

    def learn(self, model: str, *, chars: int, prompt_tokens: int) -> None:
        """An engine counted `prompt_tokens` in a prompt of `chars` characters. Impossible counts teach nothing."""
        if chars <= 0 or prompt_tokens <= 0:
            return
        bounded_chars = min(max(chars / prompt_tokens, LOWEST_RATIO), HIGHEST_RATIO) * prompt_tokens
        # A prompt of a million tokens weighs like one that fills the memory by half: one request is not the world.
        weight = min(1.0, _MEMORY_TOKENS / 2 / prompt_tokens)
        old_chars, old_tokens = self._sums.get(model, (FIRST_RATIO * _PRIOR_TOKENS, _PRIOR_TOKENS))
        kept = max(0.0, 1.0 - prompt_tokens * weight / _MEMORY_TOKENS)
        self._sums[model] = (old_chars * kept + bounded_chars * weight, old_tokens * kept + prompt_tokens * weight)
        self._sums.move_to_end(model)
        if len(self._sums) > _MODELS:
            self._sums.popitem(last=False)


def prompt_size(body: Mapping[str, object]) -> tuple[int, int]:
    """Characters of the texts the prompt is made of, and token ids given as such. Media count nothing."""
    chars, id_count = 0, 0
    waiting: list[object] = [body.get(name) for name in ("messages", "tools", "documents", "prompt")]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            chars += len(value)
        elif isinstance(value, list) and value and isinstance(value[0], int):
            id_count += len(value)
        elif isinstance(value, list):
            waiting.extend(value)
        elif isinstance(value, dict):
            waiting.extend(item for key, item in value.items() if key not in _NOT_TEXT)
    return chars, id_count


_NOT_TEXT = frozenset(
    {"audio_url", "data", "file", "image_url", "input_audio", "input_image", "role", "type", "video_url"}
)
