"""A model directory's tokenizer and chat template: a request body in, the token ids the engine will make of it out.

Everything here is synchronous and meant for a worker thread. Texts are encoded in parts (gateway/token_cuts.py): a
part seen before comes from the cache, and between parts the interpreter is free for the event loop. `encode_batch_fast`
is used even for one text because it lets go of the interpreter lock; `encode` does not (30 ms of stall for 100 KB).

Source: transformers 5.19.0, `PreTrainedTokenizerBase._from_pretrained`, `TokenizersBackend.__init__` (which files
count, which tokens are added); vLLM 0.32.0, `TokenizeParams` (special tokens, truncation).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Encoding, Tokenizer

from gateway.chat_messages import NotRenderable, Obstacle
from gateway.chat_template import ChatTemplate
from gateway.core.errors import ConfigError
from gateway.model_directory import ModelDirectory
from gateway.template_sandbox import RenderBudget
from gateway.token_cache import TokenCache, text_key
from gateway.token_cuts import AddedTokenFacts, Cuts

_BATCH_CHARS = 32768
"""Characters per call of the tokenizer: some 6 ms of encoding, then half a millisecond of holding the interpreter."""


@dataclass(frozen=True, slots=True)
class TokenizerLimits:
    """Bounds of one model's tokenizer."""

    cache_bytes: int = 64 << 20
    text_chars: int = 4_000_000
    """Longest prompt text that is tokenised here."""
    render_s: float = 2.0
    """Longest a chat template may run."""


class ModelTokenizer:
    """One model's tokenizer. Safe to use from several threads: nothing of it changes after the start but the cache."""

    def __init__(self, directory: ModelDirectory, limits: TokenizerLimits) -> None:
        self._limits = limits
        self._template = ChatTemplate(directory.templates, directory.special_tokens)
        self._tokenizer = _tokenizer(directory)
        self.cuts = Cuts(_added_facts(self._tokenizer), directory.normalizer, directory.pre_tokenizer)
        self.cache = TokenCache(limit_bytes=limits.cache_bytes)
        self._wrapping = _wrapping(self._tokenizer)

    @classmethod
    def load(cls, path: Path, limits: TokenizerLimits = TokenizerLimits()) -> ModelTokenizer:
        """The tokenizer of a model directory, or of the directory a `tokenizer.json` lies in.

        Raises ConfigError when it is missing, broken or over its size limit.
        """
        return cls(ModelDirectory.load(path.parent if path.name == "tokenizer.json" else path), limits)

    def chat_ids(self, body: Mapping[str, object], is_abandoned: Callable[[], bool]) -> NDArray[np.int32]:
        """Token ids of an OpenAI chat body, int32, shape (tokens,). Raises NotRenderable."""
        _refuse_engine_fields(body)
        budget = RenderBudget(
            limit_s=self._limits.render_s, limit_chars=self._limits.text_chars * 4, is_abandoned=is_abandoned
        )
        text = self._template.render(body, budget)
        return self.encode(text, add_special_tokens=_adds_special(body, default=False), is_abandoned=is_abandoned)

    def text_ids(self, text: str, body: Mapping[str, object], is_abandoned: Callable[[], bool]) -> NDArray[np.int32]:
        """Token ids of a completion body's prompt text, int32, shape (tokens,). Raises NotRenderable."""
        _refuse_engine_fields(body)
        return self.encode(text, add_special_tokens=_adds_special(body, default=True), is_abandoned=is_abandoned)

    def encode(
        self, text: str, *, add_special_tokens: bool = False, is_abandoned: Callable[[], bool] = lambda: False
    ) -> NDArray[np.int32]:
        """Token ids of a text, int32, shape (tokens,), equal to encoding it whole. Raises NotRenderable."""
        if len(text) > self._limits.text_chars:
            raise NotRenderable(Obstacle.TOO_LONG, f"{len(text)} characters")
        if add_special_tokens and self._wrapping is None:
            return self._encoded([text], add_special_tokens=True)[0]
        pieces = self._pieces(text, is_abandoned)
        if add_special_tokens and self._wrapping is not None:
            pieces = [self._wrapping[0], *pieces, self._wrapping[1]]
        return np.concatenate(pieces) if pieces else np.empty(0, np.int32)

    def _pieces(self, text: str, is_abandoned: Callable[[], bool]) -> list[NDArray[np.int32]]:
        try:
            parts = [(part, text_key(part)) for part in self.cuts.parts(text)]
        except UnicodeEncodeError as error:
            raise NotRenderable(Obstacle.NOT_UNICODE, "a lone surrogate") from error
        known = [self.cache.get(key) for _, key in parts]
        missing = [at for at, ids in enumerate(known) if ids is None]
        for batch in _batches(missing, [len(part) for part, _ in parts]):
            if is_abandoned():
                raise NotRenderable(Obstacle.TIMEOUT, "nobody waits any more")
            for at, ids in zip(batch, self._encoded([parts[at][0] for at in batch]), strict=True):
                known[at] = ids
                self.cache.put(parts[at][1], ids)
        return [ids for ids in known if ids is not None]

    def _encoded(self, texts: list[str], *, add_special_tokens: bool = False) -> list[NDArray[np.int32]]:
        try:
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        except UnicodeEncodeError as error:
            raise NotRenderable(Obstacle.NOT_UNICODE, "a lone surrogate") from error
        except BaseException as error:  # a panic of the library is not an Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise NotRenderable(Obstacle.TOKENIZER_FAILED, str(error)) from error
        return [_ids(encoding) for encoding in encodings]


def _ids(encoding: Encoding) -> NDArray[np.int32]:
    return np.array(encoding.ids, dtype=np.int32)


def _batches(wanted: list[int], sizes: list[int]) -> list[list[int]]:
    batches: list[list[int]] = []
    chars = _BATCH_CHARS
    for at in wanted:
        if chars + sizes[at] > _BATCH_CHARS:
            batches.append([])
            chars = 0
        batches[-1].append(at)
        chars += sizes[at]
    return batches


def _refuse_engine_fields(body: Mapping[str, object]) -> None:
    """Fields that change the ids after the template: only the engine knows what comes out."""
    for name in ("truncate_prompt_tokens", "suffix", "prompt_embeds", "media_io_kwargs", "mm_processor_kwargs"):
        if body.get(name) is not None:
            raise NotRenderable(Obstacle.UNKNOWN_FIELD, name)


def _adds_special(body: Mapping[str, object], *, default: bool) -> bool:
    adds = body.get("add_special_tokens", default)
    if not isinstance(adds, bool):
        raise NotRenderable(Obstacle.UNKNOWN_FIELD, "add_special_tokens")
    return adds


def _tokenizer(directory: ModelDirectory) -> Tokenizer:
    # One prompt must not take every core from the event loop; read by the library at each batch.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        tokenizer = Tokenizer.from_str(directory.tokenizer_json)
    except BaseException as error:  # a panic of the library is not an Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ConfigError(f"tokens.tokenizer: tokenizer.json cannot be used: {error}") from error
    tokenizer.no_truncation()  # the engine sets both for each request, whatever the file says
    tokenizer.no_padding()
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    missing = [token for token in directory.added_tokens if token.content not in known]
    tokenizer.add_tokens([_added_token(token) for token in missing])
    return tokenizer


def _added_token(facts: AddedTokenFacts) -> AddedToken:
    return AddedToken(
        facts.content,
        single_word=facts.is_single_word,
        lstrip=facts.strips_left,
        rstrip=facts.strips_right,
        normalized=facts.is_normalized,
        special=True,
    )


def _added_facts(tokenizer: Tokenizer) -> list[AddedTokenFacts]:
    return [
        AddedTokenFacts(token.content, token.normalized, token.lstrip, token.rstrip, token.single_word)
        for token in tokenizer.get_added_tokens_decoder().values()
    ]


def _wrapping(tokenizer: Tokenizer) -> tuple[NDArray[np.int32], NDArray[np.int32]] | None:
    """Special ids put before and after a text; None when the tokenizer does more than that."""
    wrappings = []
    for probe in ("a", "the quick brown"):
        plain, wrapped = (tokenizer.encode(probe, add_special_tokens=adds).ids for adds in (False, True))
        starts = [at for at in range(len(wrapped) - len(plain) + 1) if wrapped[at : at + len(plain)] == plain]
        if not plain or len(starts) != 1:
            return None
        wrappings.append((wrapped[: starts[0]], wrapped[starts[0] + len(plain) :]))
    if wrappings[0] != wrappings[1]:
        return None
    return np.array(wrappings[0][0], np.int32), np.array(wrappings[0][1], np.int32)
