"""OpenAI chat messages -> the conversation a chat template is given, exactly as vLLM makes it.

What vLLM would refuse, or would answer in a way that cannot be foretold from the body alone, raises `NotRenderable`
with the reason as a named state.

Source: vLLM 0.32.0, renderers/chat_utils.py (`_parse_chat_message_content`, `_postprocess_messages`) and
entrypoints/openai/chat_completion/protocol.py (`_normalize_messages_before`, the dumps of `tools`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import TypeAlias

from gateway.content_format import ContentFormat

Message: TypeAlias = dict[str, object]


class Obstacle(StrEnum):
    """Why a prompt's token ids are not known exactly. The string is the metric label and the journal word."""

    NO_TOKENIZER = "no_tokenizer"
    NO_TEMPLATE = "no_template"
    NOT_A_PROMPT = "not_a_prompt"
    """The body has no messages or prompt of a known shape: the engine will refuse it."""
    SEVERAL_PROMPTS = "several_prompts"
    MEDIA = "media"
    REQUEST_TEMPLATE = "request_template"
    UNKNOWN_FIELD = "unknown_field"
    """A field changes the prompt in a way only the engine knows (truncation, a suffix, its own options)."""
    TEMPLATE_ERROR = "template_error"
    TEMPLATE_LIMIT = "template_limit"
    NOT_UNICODE = "not_unicode"
    TOO_LONG = "too_long"
    BUSY = "busy"
    TIMEOUT = "timeout"
    TOKENIZER_FAILED = "tokenizer_failed"


class NotRenderable(Exception):
    """The prompt cannot be told exactly here, for the reason in `obstacle`."""

    def __init__(self, obstacle: Obstacle, detail: str = "") -> None:
        super().__init__(f"{obstacle}: {detail}" if detail else obstacle)
        self.obstacle = obstacle


_TEXT_KEYS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal", "thinking": "thinking"}
"""Content part types that are text -> the key that holds it."""

_MEDIA_KEYS = (
    "audio_embeds",
    "audio_url",
    "image_embeds",
    "image_pil",
    "image_url",
    "input_audio",
    "input_image",
    "prompt_embeds",
    "video_embeds",
    "video_url",
)

_PART_KEYS = frozenset(
    (*_MEDIA_KEYS, "closed", "data", "file", "name", "prompt_cache_breakpoint", "refusal", "text", "thinking", "type")
) | {"uuid"}
"""Keys of a content part that vLLM reads itself; any other key travels on to a template of the OpenAI format."""

_BILLING_HEADER = "x-anthropic-billing-header"


def conversation(messages: object, form: ContentFormat) -> list[Message]:
    """The messages a template is given. Raises NotRenderable."""
    if not isinstance(messages, list) or not messages:
        raise NotRenderable(Obstacle.NOT_A_PROMPT, "messages is not a list with something in it")
    return [_message(message, form) for message in messages]


def template_tools(tools: object) -> list[Message] | None:
    """The tools a template is given: vLLM's field order, with absent descriptions and parameters as null."""
    if tools is None:
        return None
    if not isinstance(tools, list) or not tools:
        raise NotRenderable(Obstacle.NOT_A_PROMPT, "tools is not a list with something in it")
    return [_tool(tool) for tool in tools]


def _tool(tool: object) -> Message:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(tool, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise NotRenderable(Obstacle.NOT_A_PROMPT, "a tool has no function with a name")
    if tool.get("defer_loading") is not None or function.get("defer_loading") is not None:
        raise NotRenderable(Obstacle.UNKNOWN_FIELD, "defer_loading")
    shown: Message = {key: function.get(key) for key in ("name", "description", "parameters")}
    if function.get("strict") is not None:
        shown["strict"] = function["strict"]
    return {"type": "function", "function": shown}


def _message(message: object, form: ContentFormat) -> Message:
    if not isinstance(message, dict) or not isinstance(role := message.get("role"), str):
        raise NotRenderable(Obstacle.NOT_A_PROMPT, "a message has no role")
    shown: Message = {"role": role, "content": _content(message.get("content"), role, form)}
    if role == "assistant":
        _add_assistant_fields(shown, message)
    elif role == "tool":
        _add_tool_fields(shown, message)
    for key in ("name", "task"):
        if isinstance(message.get(key), str):
            shown[key] = message[key]
    if role == "developer":
        shown["tools"] = message.get("tools")
    return shown


def _content(content: object, role: str, form: ContentFormat) -> str | list[Message]:
    if isinstance(content, str) and form is ContentFormat.STRING and role != "system":
        return content
    parts = [] if content is None else [content] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise NotRenderable(Obstacle.NOT_A_PROMPT, "content is neither a text nor a list of parts")
    texts = [text for part in parts if (text := _text_part(part)) is not None]
    if role == "system":
        texts = _without_billing_header(texts)
    if form is ContentFormat.STRING:
        return "\n".join(str(text["text"]) for text in texts)
    return texts


def _text_part(part: object) -> Message | None:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise NotRenderable(Obstacle.NOT_A_PROMPT, "a content part is neither a text nor an object")
    kind = part.get("type")
    if any(key in part for key in _MEDIA_KEYS) or part.get("uuid") is not None or kind not in _TEXT_KEYS:
        raise NotRenderable(Obstacle.MEDIA, str(kind))
    text = part.get(_TEXT_KEYS[kind])
    if text is None and kind in ("text", "refusal"):
        return None
    if not isinstance(text, str):
        raise NotRenderable(Obstacle.NOT_A_PROMPT, "a text part has no text")
    return {"type": "text", "text": text} | {key: value for key, value in part.items() if key not in _PART_KEYS}


def _without_billing_header(texts: Sequence[Message]) -> list[Message]:
    """System texts without the line that changes with every request of one well-known client."""
    kept = []
    for part in texts:
        text = str(part["text"])
        if text.startswith(_BILLING_HEADER):
            text = text.partition("\n")[2]
            if not text:
                continue
        kept.append({**part, "text": text})
    return kept


def _add_assistant_fields(shown: Message, message: Mapping[str, object]) -> None:
    calls = message.get("tool_calls")
    if isinstance(calls, list) and calls:
        shown["tool_calls"] = [_tool_call(call) for call in calls]
    elif calls is not None and not isinstance(calls, list):
        raise NotRenderable(Obstacle.NOT_A_PROMPT, "tool_calls is not a list")
    reasoning = message.get("reasoning")
    if reasoning is None:
        reasoning = message.get("reasoning_content")
    if reasoning is not None:
        shown["reasoning"] = shown["reasoning_content"] = reasoning


def _tool_call(call: object) -> Message:
    """One tool call as the validated request holds it, key by key in that order, with its arguments parsed."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or call.get("type") != "function":
        raise NotRenderable(Obstacle.NOT_A_PROMPT, "a tool call is not a function call")
    arguments, name = function.get("arguments"), function.get("name")
    if not isinstance(arguments, str) or not isinstance(name, str) or not isinstance(call.get("id"), str):
        raise NotRenderable(Obstacle.NOT_A_PROMPT, "a tool call lacks its id, name or arguments")
    shown: Message = {"arguments": _parsed(arguments), "name": name, **_others(function, "arguments", "name")}
    return {"id": call["id"], "function": shown, "type": "function", **_others(call, "id", "function", "type")}


def _parsed(arguments: str) -> dict[str, object]:
    try:
        parsed = json.loads(arguments) if arguments else {}
    except (ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _others(mapping: Mapping[str, object], *known: str) -> Message:
    return {key: value for key, value in mapping.items() if key not in known}


def _add_tool_fields(shown: Message, message: Mapping[str, object]) -> None:
    if "tool_call_id" in message:
        shown["tool_call_id"] = message["tool_call_id"]
    if isinstance(parts := shown["content"], list):
        shown["content"] = "\n".join(str(part["text"]) for part in parts)
