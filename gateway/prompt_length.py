"""How many tokens a prompt has, when nobody counted them: its characters by a ratio learnt from what engines report."""

from __future__ import annotations

import math

from adapters.base import Payload

FORGET = 0.02
"""Weight of the newest observation: about the last 50 prompts of a model count."""
MAX_MODELS = 1024


class PromptLength:
    """Characters per token, per model."""

    def __init__(self, characters_per_token: float) -> None:
        self._initial = characters_per_token
        self._ratios: dict[str, float] = {}

    def tokens(self, payload: Payload) -> int:
        """The prompt's length in tokens, >= 1: exact for token-id prompts, else estimated."""
        if payload.prompt_tokens is not None:
            return max(1, payload.prompt_tokens)
        ratio = self._ratios.get(payload.model or "", self._initial)
        return max(1, math.ceil(payload.prompt_chars / ratio))

    def observe(self, payload: Payload, prompt_tokens: int) -> None:
        """An engine counted that many tokens for this prompt."""
        if not payload.prompt_chars or prompt_tokens <= 0 or payload.model is None:
            return
        if payload.model not in self._ratios and len(self._ratios) >= MAX_MODELS:
            return
        known = self._ratios.get(payload.model, self._initial)
        self._ratios[payload.model] = known + FORGET * (payload.prompt_chars / prompt_tokens - known)
