"""Gather: everything the core needs to know of a request before it decides, awaited before it is asked.

Token ids give the prompt's exact length and, hashed at each block size in use, the names of its KV blocks. They come
from the model's own tokenizer when one is configured, else from an engine's `/tokenize`, else there is an estimate and
no blocks. Ids from a tokenizer of ours are passed on to engines only after an engine gave the same ids for the same
text: a tokenizer of the wrong model would otherwise change answers without a word.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import structlog

from adapters.base import Payload
from adapters.openai import CHAT, COMPLETIONS
from gateway.core.blocks import hash_prompt
from gateway.core.types import BlockHashes, Request
from gateway.driver import Driver
from gateway.engine_tokenizers import EngineTokenizers
from gateway.slo import Promise
from gateway.tokens import PromptTokens, Tokenised, TokenSource

MAX_CHECKED_MODELS = 1024

log = structlog.get_logger("sluice.gather")


@dataclass(frozen=True, slots=True)
class Gathered:
    """A request as the core takes it, and the payload with what was learnt of its prompt."""

    request: Request
    payload: Payload
    tokenised: Tokenised


class Gather:
    """Turns payloads into requests."""

    def __init__(self, driver: Driver, tokens: PromptTokens, engines: EngineTokenizers | None) -> None:
        """`engines` None: engines are never asked to tokenise."""
        self._driver = driver
        self._tokens = tokens
        self._engines = engines
        self._is_sound: dict[str, bool] = {}
        """Model -> whether our tokenizer gave the ids that an engine gave."""

    async def __call__(
        self, payload: Payload, *, arrived_at: float, promise: Promise, tenant: str, client: int | None = None
    ) -> Gathered:
        """What the core needs to know of a request of that tenant and client (`gateway/clients.py`).

        Never fails: what cannot be known is estimated.
        """
        tokenised = await self._tokenise(payload)
        if tokenised.ids is not None and await self._may_pass_on(payload, tokenised):
            payload = replace(payload, token_ids=tokenised.ids)
        request = Request(
            id=payload.request_id,
            model=payload.model or "",
            arrived_at=arrived_at,
            prompt_tokens=max(1, tokenised.count),
            is_prompt_exact=tokenised.source is not TokenSource.ESTIMATE or payload.prompt_tokens is not None,
            max_output_tokens=payload.max_output_tokens,
            can_hand_off=payload.can_hand_off,
            block_hashes=self._block_hashes(payload, tokenised),
            slo=promise.slo,
            priority=promise.priority,
            tenant=tenant,
            client=client,
        )
        return Gathered(request, payload, tokenised)

    def learn(self, gathered: Gathered, prompt_tokens: int) -> None:
        """An engine counted that many tokens in the prompt."""
        self._tokens.learn(gathered.payload, gathered.tokenised, prompt_tokens)

    async def close(self) -> None:
        """Ends the tokenizer's threads."""
        await self._tokens.aclose()

    async def _tokenise(self, payload: Payload) -> Tokenised:
        # On routes that are passed through only the size matters: no engine is asked.
        is_asked = self._engines is not None and payload.path in (CHAT, COMPLETIONS)
        ask = self._engines.asker(payload.model or "") if is_asked and self._engines else None
        return await self._tokens.tokenise(payload, ask_engine=ask)

    async def _may_pass_on(self, payload: Payload, tokenised: Tokenised) -> bool:
        """Whether the ids are certain to be those the engine would make of the prompt."""
        if payload.prompt_tokens is not None:
            return False  # the client sent ids: they are in the body already
        if tokenised.source is TokenSource.ENGINE:
            return True
        model = payload.model or ""
        if model not in self._is_sound and self._engines is not None and len(self._is_sound) < MAX_CHECKED_MODELS:
            await self._check(payload, tokenised, model)
        return self._is_sound.get(model, False)

    async def _check(self, payload: Payload, tokenised: Tokenised, model: str) -> None:
        """Compares our ids with an engine's, once per model; says nothing where no engine tells."""
        assert self._engines is not None
        told = await self._engines.ids(payload.body, model)
        if told is None or tokenised.ids is None:
            return
        self._is_sound[model] = bool(np.array_equal(told, tokenised.ids))
        if not self._is_sound[model]:
            log.warning("tokenizer_differs_from_engine", model=model, ours=tokenised.count, engine=int(told.size))

    def _block_hashes(self, payload: Payload, tokenised: Tokenised) -> dict[int, BlockHashes]:
        """The prompt's block hashes at each block size in use; none when its ids are not known."""
        if tokenised.ids is None or self._is_sound.get(payload.model or "") is False:
            return {}
        salt = payload.body.get("cache_salt")
        engines = [state.engine for state in self._driver.scheduler.cluster.engines.values()]
        is_lora = any(payload.model in engine.lora_names for engine in engines)
        return {
            size: hash_prompt(
                tokenised.ids,
                size,
                lora_name=payload.model if is_lora else None,
                cache_salt=salt if isinstance(salt, str) else None,
            )
            for size in self._driver.scheduler.block_sizes
        }
