"""Token ids on their way to an engine, so that it need not tokenise again, and from an engine's own tokenizer.

Source: vLLM 0.32.0, renderers/online_renderer.py `_reused_prompt_token_ids`, renderers/chat_utils.py
`has_non_text_content`, entrypoints/serve/tokenize/protocol.py; reference/engine-protocols.md A.4 and D.3 (SGLang).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from gateway.core.errors import MalformedEngineData

Ids: TypeAlias = NDArray[np.int32]

_NOT_TAKEN_BESIDE_IDS = ("echo", "suffix", "truncate_prompt_tokens", "prompt_embeds", "add_special_tokens")
"""Fields with which the engine reads the text again, or with which the ids would not be the whole prompt."""

_TEXT_PARTS = frozenset({"text", "input_text", "output_text", "refusal", "thinking"})
_TEXT_PART_KEYS = frozenset({"cache_control", "refusal", "text", "thinking", "type"})


class _Tokenized(msgspec.Struct):
    tokens: list[Annotated[int, msgspec.Meta(ge=0, lt=2**31)]]


class _Detokenized(msgspec.Struct):
    prompt: str


class _HasTokens(msgspec.Struct):
    tokens: msgspec.Raw


def with_token_ids(body: Mapping[str, object], ids: Ids, adapter: str) -> dict[str, object]:
    """The body with the prompt's ids in it where the engine takes them, else the body as it was. Never changes `body`.

    vLLM takes them in `kv_transfer_params` of a text-only chat, beside the transfer parameters themselves, SGLang in
    `input_ids` of a chat; both take them as the `prompt` of a completion.
    """
    if not ids.size or any(body.get(name) for name in _NOT_TAKEN_BESIDE_IDS):
        return dict(body)
    if "messages" not in body:
        return {**body, "prompt": ids.tolist()} if isinstance(body.get("prompt"), str) else dict(body)
    if not _is_text_only(body["messages"]):
        return dict(body)
    if adapter == "sglang":
        return {**body, "input_ids": ids.tolist()}
    if adapter == "vllm":
        transfer = body.get("kv_transfer_params")
        return {**body, "kv_transfer_params": {**_mapping(transfer), "prompt_token_ids": ids.tolist()}}
    return dict(body)


def tokenize_body(body: Mapping[str, object]) -> dict[str, object] | None:
    """The `/tokenize` body that asks vLLM for this request's prompt ids; None when it could not tell them."""
    if body.get("truncate_prompt_tokens") is not None or body.get("suffix") is not None:
        return None
    asked = {name: body[name] for name in ("model", "add_special_tokens") if body.get(name) is not None}
    if isinstance(body.get("prompt"), str) and "messages" not in body:
        return {**asked, "prompt": body["prompt"]}
    if not isinstance(messages := body.get("messages"), list) or not _is_text_only(messages):
        return None
    copied = ("tools", "add_generation_prompt", "continue_final_message")
    asked |= {name: body[name] for name in copied if body.get(name) is not None}
    # /tokenize has no fields for these two: the template gets them as its own arguments.
    chosen = {name: body[name] for name in ("documents", "reasoning_effort") if body.get(name) is not None}
    kwargs = _mapping(body.get("chat_template_kwargs"))
    if "reasoning_effort" in chosen and "enable_thinking" not in kwargs:
        chosen["enable_thinking"] = chosen["reasoning_effort"] != "none"
    if chosen or kwargs:
        asked["chat_template_kwargs"] = {**kwargs, **chosen}
    return {**asked, "messages": [_with_reasoning(message) for message in messages]}


def check_tokenize(answer: bytes) -> None:
    """Raises MalformedEngineData when the answer has no tokens at all; much cheaper than parsing them."""
    try:
        msgspec.json.decode(answer, type=_HasTokens)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise MalformedEngineData(f"the answer of /tokenize holds no tokens: {error}") from error


def parse_tokenize(answer: bytes) -> Ids:
    """The ids of a `/tokenize` answer, int32, shape (tokens,). Raises MalformedEngineData."""
    try:
        return np.array(msgspec.json.decode(answer, type=_Tokenized).tokens, dtype=np.int32)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise MalformedEngineData(f"the answer of /tokenize is not a list of token ids: {error}") from error


def detokenize_body(ids: Sequence[int], model: str) -> dict[str, object]:
    """The `/detokenize` body that asks vLLM for the text of these ids."""
    return ({"model": model} if model else {}) | {"tokens": list(ids)}


def parse_detokenize(answer: bytes) -> str:
    """The text of a `/detokenize` answer of vLLM. Raises MalformedEngineData."""
    try:
        return msgspec.json.decode(answer, type=_Detokenized).prompt
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise MalformedEngineData(f"the answer of /detokenize is not a text: {error}") from error


def _is_text_only(messages: object) -> bool:
    if not isinstance(messages, list):
        return False
    contents = [message.get("content") if isinstance(message, Mapping) else None for message in messages]
    return all(_is_text_part(part) for content in contents if isinstance(content, list) for part in content)


def _is_text_part(part: object) -> bool:
    if not isinstance(part, Mapping):
        return isinstance(part, str)
    return part.get("type", "text") in _TEXT_PARTS and _TEXT_PART_KEYS.issuperset(part)


def _with_reasoning(message: object) -> object:
    """The message as the chat endpoint would normalise it: `reasoning_content` is the old name of `reasoning`."""
    if not isinstance(message, Mapping) or message.get("reasoning_content") is None:
        return message
    return {"reasoning": message["reasoning_content"], **message}


def _mapping(value: object) -> dict[str, object]:
    return dict(value) if isinstance(value, Mapping) else {}
