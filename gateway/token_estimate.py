"""How many tokens a prompt has when nobody can tell: its characters over a ratio learnt from answered requests."""

from __future__ import annotations

from collections import OrderedDict

LOWEST_RATIO, HIGHEST_RATIO = 0.25, 16.0
"""Bounds of what one answer may teach: an emoji is up to four byte tokens, a run of spaces one token for many."""

_MEMORY_TOKENS = 50_000.0
"""Tokens over which older answers fade: some tens of requests, so that a change of use shows within minutes."""

_PRIOR_TOKENS = 500.0
"""Weight of the first guess, in tokens: one ordinary answer moves the ratio, one tiny answer hardly does."""

_MODELS = 256
"""Most models with a ratio of their own; the one not heard of for longest goes first."""


class TokenRatios:
    """Characters per prompt token for each model."""

    def __init__(self, first_ratio: float = 4.0) -> None:
        """`first_ratio`: the guess before anything is learnt; 4 suits English under 32 to 128 thousand entries."""
        self._first = (first_ratio * _PRIOR_TOKENS, _PRIOR_TOKENS)
        self._sums: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def ratio(self, model: str) -> float:
        """Characters per token; the first guess for a model not heard of."""
        chars, tokens = self._sums.get(model, self._first)
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
        old_chars, old_tokens = self._sums.get(model, self._first)
        kept = max(0.0, 1.0 - prompt_tokens * weight / _MEMORY_TOKENS)
        self._sums[model] = (old_chars * kept + bounded_chars * weight, old_tokens * kept + prompt_tokens * weight)
        self._sums.move_to_end(model)
        if len(self._sums) > _MODELS:
            self._sums.popitem(last=False)
