"""How a stream whose engine died goes on at another one: what was said so far, the request for the rest, its rewriting.

The rest is asked for as a longer prompt: prompt plus output so far as token ids where the engine told them (the very
tokens, so at temperature 0 the very text), else as text (vLLM: `continue_final_message` of a chat, a longer `prompt` of
a completion). Its events then get the names of the first stream, lose what only a beginning has (the role, the prompt's
ids), and count prompt and output tokens as one engine would have.

Nothing here runs for a stream that goes well but `hide_token_ids`, which takes out what the client did not ask for.
Source: vllm 0.32.0, entrypoints/openai/{chat_completion,completion}/{protocol,serving}.py, v1/engine/detokenizer.py.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

import msgspec
import numpy as np
from msgspec import Struct

from adapters.base import Payload
from adapters.openai import CHAT, COMPLETIONS, COMPLETIONS_MAX_TOKENS
from adapters.token_ids import with_token_ids

TOKEN_IDS: Final = "return_token_ids"
LIMITS: Final = ("max_tokens", "max_completion_tokens")

# With any of these the rest is not what a longer prompt gives: state that a new engine does not have (a seed's place,
# a grammar, counts of output tokens, half a stop string), or events that are more than text.
_NOT_CONTINUED: Final = (
    *("tools", "functions", "response_format", "structured_outputs", "stop", "stop_token_ids"),
    *(
        "logprobs",
        "top_logprobs",
        "prompt_logprobs",
        "logprob_token_ids",
        "echo",
        "suffix",
        "bad_words",
        "use_beam_search",
    ),
    *("presence_penalty", "frequency_penalty", "truncate_prompt_tokens", "prompt_embeds", "return_tokens_as_token_ids"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "thinking_token_budget"),
)

_IDS: Final = re.compile(rb'(token_ids":)\[[0-9, ]*\]')
_IDS_BEGIN: Final = b'token_ids":['


def can_continue(payload: Payload) -> bool:
    """Whether this request is one that another engine could finish: a streamed text of one choice, and nothing in it
    that a longer prompt would not carry on."""
    if not payload.is_stream or not payload.can_hand_off or payload.path not in (CHAT, COMPLETIONS):
        return False
    body = payload.body
    if body.get("seed") is not None or body.get("repetition_penalty") not in (None, 1):
        return False
    return not any(body.get(name) not in (None, 0, False, []) for name in _NOT_CONTINUED)


def asking_for_ids(payload: Payload) -> Payload:
    """The payload whose answer tells the token ids of its text."""
    return replace(payload, body=payload.body | {TOKEN_IDS: True})


def hide_token_ids(events: bytes) -> bytes:
    """The events as they are for a request that did not ask for token ids. Within a string JSON escapes every quote, so
    nothing of a text can look like the field."""
    return events if events.rfind(_IDS_BEGIN) < 0 else _IDS.sub(rb"\1null", events)


class _Delta(Struct):
    role: Any = None
    content: str | None = None
    tool_calls: Any = None
    reasoning: Any = None
    reasoning_content: Any = None
    refusal: Any = None
    function_call: Any = None

    @property
    def is_only_text(self) -> bool:
        return not (self.tool_calls or self.reasoning or self.reasoning_content or self.refusal or self.function_call)


class _Choice(Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class _Event(Struct):
    id: str | None = None
    created: int | None = None
    model: str | None = None
    choices: list[_Choice] = []
    prompt_token_ids: list[int] | None = None
    usage: Any = None


_EVENT: Final = msgspec.json.Decoder(_Event)

TextOf: TypeAlias = Callable[[tuple[int, ...]], Awaitable[str | None]]
"""Token ids to their text by the model's own tokenizer; None: nobody tells."""


@dataclass(slots=True)
class Said:
    """What a stream has said."""

    id: str | None = None
    created: int | None = None
    model: str | None = None
    text: str = ""
    token_ids: tuple[int, ...] | None = ()
    """Of the text: tokens of half a character are left out. None: the engine did not tell."""
    prompt_ids: tuple[int, ...] | None = None
    events: int = 0
    """Events with text: tokens, where the engine told no ids."""
    finish_reason: str | None = None
    is_only_text: bool = True
    unsure: int = 0
    """How many of the last ids came with the last text, where it was several: an engine that puts the tokens of some
    steps into one event holds back the text of a half character at its end, but not its ids."""

    @property
    def tokens(self) -> int:
        """Output tokens said."""
        return self.events if self.token_ids is None else len(self.token_ids)


def said_in(raw: bytes) -> Said:
    """What these whole events say. Events that are not a generation's make it not only text."""
    said = Said()
    unspoken: list[int] = []
    for block in raw.replace(b"\r\n", b"\n").split(b"\n\n"):
        for line in block.split(b"\n"):
            if line.startswith(b"data:") and line[5:].strip() != b"[DONE]":
                _hear(said, unspoken, line[5:].strip())
    return said


def _hear(said: Said, unspoken: list[int], data: bytes) -> None:
    try:
        event = _EVENT.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        said.is_only_text = False
        return
    if said.id is None:
        said.id, said.created, said.model = event.id, event.created, event.model
    if event.prompt_token_ids:
        said.prompt_ids = tuple(event.prompt_token_ids)
    for choice in event.choices:
        _hear_choice(said, unspoken, choice)


def _hear_choice(said: Said, unspoken: list[int], choice: _Choice) -> None:
    if choice.prompt_token_ids:
        said.prompt_ids = tuple(choice.prompt_token_ids)
    is_preamble = choice.delta is not None and choice.delta.role is not None and not choice.delta.content
    text = (choice.text if choice.delta is None else choice.delta.content) or ""
    said.is_only_text &= choice.delta is None or choice.delta.is_only_text
    said.finish_reason = choice.finish_reason or said.finish_reason
    if is_preamble and not choice.token_ids:
        return
    if choice.token_ids is None:
        said.token_ids = None
    else:
        unspoken += choice.token_ids
    said.text += text
    said.events += bool(text)
    if text and said.token_ids is not None:
        said.unsure = len(unspoken) if len(choice.token_ids or ()) > 1 else 0
        said.token_ids += tuple(unspoken)
        unspoken.clear()


def without_ids(said: Said) -> Said:
    """The same by its text alone; its tokens stay counted."""
    return replace(said, token_ids=None, unsure=0, events=said.tokens)


async def without_half_characters(said: Said, text_of: TextOf) -> Said:
    """What was said with the ids of its text and of no more, so that a prompt made of them ends with a character.

    An engine's detokenizer holds back what ends with U+FFFD and forgets what it had said before a prompt that ends so:
    it would say the whole prompt again. Where `text_of` cannot tell, what was said comes back without ids.
    """
    ids = said.token_ids
    if ids is None or not said.unsure:
        return said
    for dropped in range(said.unsure):
        text = await text_of(ids[len(ids) - said.unsure : len(ids) - dropped])
        if text is None:
            break
        if not text.endswith("\ufffd"):
            return replace(said, token_ids=ids[: len(ids) - dropped], unsure=0)
    return without_ids(said)


def rest_of(payload: Payload, said: Said) -> Payload | None:
    """The request for what was not said yet; None where it cannot be asked for.

    `payload` is the client's request, `said` what all its streams so far have said. The prompt's ids are those that the
    engine told, or else ours.
    """
    body = dict(payload.body)
    left = _left_tokens(payload, said)
    if not said.is_only_text or (left is not None and left < 1):
        return None
    for name in LIMITS:
        if body.get(name) is not None:
            body[name] = left
    if left is not None and not any(body.get(name) is not None for name in LIMITS):
        body["max_tokens"] = left
    if isinstance(floor := body.get("min_tokens"), int):
        body["min_tokens"] = max(0, floor - said.tokens)
    longer = _by_ids(payload, body, said) or _by_text(payload, body, said)
    # What was encoded was looked up in the old body's values: a new body begins with nothing.
    return None if longer is None else replace(longer, max_output_tokens=left, encoded={})


def _left_tokens(payload: Payload, said: Said) -> int | None:
    limit = payload.max_output_tokens
    if limit is None and payload.path == COMPLETIONS:
        limit = COMPLETIONS_MAX_TOKENS
    return None if limit is None else limit - said.tokens


def _by_ids(payload: Payload, body: dict[str, object], said: Said) -> Payload | None:
    prompt_ids = said.prompt_ids
    if prompt_ids is None and payload.token_ids is not None:
        prompt_ids = tuple(payload.token_ids.tolist())
    if said.token_ids is None or prompt_ids is None:
        return None
    ids = np.array((*prompt_ids, *said.token_ids), dtype=np.int32)
    if payload.path == COMPLETIONS:
        return replace(payload, body=body | {"prompt": ids.tolist()}, token_ids=None, prompt_tokens=len(ids))
    if with_token_ids(body, ids, "vllm") == body:  # the engine would read the messages again
        return None
    return replace(payload, body=body, token_ids=ids, prompt_tokens=len(ids))


def _by_text(payload: Payload, body: dict[str, object], said: Said) -> Payload | None:
    if payload.path == COMPLETIONS:
        prompt = body.get("prompt")
        if not isinstance(prompt, str):
            return None
        body["prompt"] = prompt + said.text
    elif said.text:
        messages = body["messages"]
        assert isinstance(messages, list), "checked when it was parsed"
        if body.get("continue_final_message"):
            last = messages[-1]
            if not isinstance(last.get("content"), str):
                return None
            messages = [*messages[:-1], last | {"content": last["content"] + said.text}]
        else:
            messages = [*messages, {"role": "assistant", "content": said.text}]
        body |= {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    return replace(
        payload, body=body, token_ids=None, prompt_tokens=None, prompt_chars=payload.prompt_chars + len(said.text)
    )


@dataclass(frozen=True, slots=True)
class Rewriting:
    """Makes the events of a stream that goes on those of the stream that the client knows."""

    said: Said
    """By all streams before this one."""
    prompt_tokens: int | None
    """Of the client's own prompt, where an engine counted them."""
    shows_ids: bool
    """Whether the client asked for token ids."""

    def event(self, data: bytes) -> bytes | None:
        """The data of an event for the client; None where it has seen that already. Data that is no object of a
        generation is left as it is."""
        try:
            event = msgspec.json.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return data
        if not isinstance(event, dict) or "choices" not in event:
            return data
        choices = event["choices"]
        if isinstance(choices, list) and choices and all(map(_is_preamble, choices)):
            return None
        event |= {"id": self.said.id, "created": self.said.created, "model": self.said.model}
        self._hide_prompt(event)
        for choice in choices if isinstance(choices, list) else []:
            if not isinstance(choice, dict):
                continue
            self._hide_prompt(choice)
            if not self.shows_ids and choice.get("token_ids") is not None:
                choice["token_ids"] = None
            if isinstance(delta := choice.get("delta"), dict):
                delta.pop("role", None)
        if isinstance(usage := event.get("usage"), dict):
            event["usage"] = self._counted(usage)
        return msgspec.json.encode(event)

    def _hide_prompt(self, holder: dict[str, Any]) -> None:
        if holder.get("prompt_token_ids") is not None:
            holder["prompt_token_ids"] = None

    def _counted(self, usage: Mapping[str, Any]) -> dict[str, Any]:
        """The counts of the whole: what was said before stood in this stream's prompt."""
        prompt, total = usage.get("prompt_tokens"), usage.get("total_tokens")
        if not isinstance(prompt, int) or not isinstance(total, int):
            return dict(usage)
        own = prompt - self.said.tokens if self.prompt_tokens is None else self.prompt_tokens
        return {**usage, "prompt_tokens": own, "completion_tokens": total - own}


def _is_preamble(choice: Any) -> bool:
    delta = choice.get("delta") if isinstance(choice, dict) else None
    return (
        isinstance(delta, dict)
        and delta.get("role") is not None
        and choice.get("finish_reason") is None
        and not any(value for name, value in delta.items() if name != "role")
    )


def closing_events(said: Said, payload: Payload, prompt_tokens: int | None) -> bytes | None:
    """What is left to send of a stream that broke after its last token: the usage where the client asked for it, and
    the end. None where the counts are not known."""
    options = payload.body.get("stream_options")
    if not (isinstance(options, dict) and options.get("include_usage")):
        return b"data: [DONE]\n\n"
    if prompt_tokens is None or said.token_ids is None:
        return None
    kind = "chat.completion.chunk" if payload.path == CHAT else "text_completion"
    counts = {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens + said.tokens}
    names = {"id": said.id, "object": kind, "created": said.created, "model": said.model}
    event = names | {"choices": [], "usage": counts | {"completion_tokens": said.tokens}}
    return b"data: " + msgspec.json.encode(event) + b"\n\ndata: [DONE]\n\n"
