"""A model's chat template: an OpenAI chat body in, the prompt text out, as the engine's own front end renders it.

Source: vLLM 0.32.0, renderers/hf.py (`resolve_chat_template`, `safe_apply_chat_template`), renderers/params.py
(`merge_kwargs`), `ChatCompletionRequest.build_chat_params`; transformers 5.19.0, `render_jinja_template`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

from jinja2.exceptions import TemplateError, TemplateSyntaxError

from gateway.chat_messages import Message, NotRenderable, Obstacle, conversation, template_tools
from gateway.content_format import ContentFormat
from gateway.core.errors import ConfigError
from gateway.template_sandbox import CompiledTemplate, RenderBudget, RenderLimit

LIMIT_CHARS = 1 << 25
"""Most characters a render may print or build: above any prompt an engine takes, far below the machine's memory."""

_RESERVED_KWARGS = frozenset(
    {
        "chat_template",
        "conversation",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)
"""Names in `chat_template_kwargs` that steer the engine's renderer itself; the engine refuses most of them."""

_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "


@dataclass(frozen=True, slots=True)
class _Variant:
    template: CompiledTemplate
    form: ContentFormat
    knows_developer: bool


class ChatTemplate:
    """The templates of one model. `sources`: name -> Jinja text, of which `default` and `tool_use` mean something."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        """Compiles every template. Raises ConfigError when one has a syntax error."""
        self._special_tokens = dict(special_tokens)
        self._variants = {name: _compiled(source) for name, source in sources.items()}

    def render(self, body: Mapping[str, object], budget: RenderBudget) -> str:
        """The prompt text of an OpenAI chat body. Raises NotRenderable."""
        if body.get("chat_template") is not None:
            raise NotRenderable(Obstacle.REQUEST_TEMPLATE)
        tools = template_tools(body.get("tools"))
        variant = self._variant(has_tools=tools is not None)
        messages = conversation(body.get("messages"), variant.form)
        if not variant.knows_developer:
            messages = _without_developer(messages)
        variables = _variables(body, variant.template.variables)
        try:
            return self._rendered(variant.template, messages, tools, variables, budget)
        except NotRenderable:
            raise
        except RenderLimit as error:
            raise NotRenderable(Obstacle.TEMPLATE_LIMIT, str(error)) from error
        except (MemoryError, RecursionError) as error:
            raise NotRenderable(Obstacle.TEMPLATE_LIMIT, type(error).__name__) from error
        except Exception as error:  # a template is a program: whatever it raises says that it refuses this body
            raise NotRenderable(Obstacle.TEMPLATE_ERROR, f"{type(error).__name__}: {error}") from error

    def _variant(self, *, has_tools: bool) -> _Variant:
        if has_tools and "tool_use" in self._variants:
            return self._variants["tool_use"]
        if "default" not in self._variants:
            raise NotRenderable(Obstacle.NO_TEMPLATE)
        return self._variants["default"]

    def _rendered(
        self,
        template: CompiledTemplate,
        messages: list[Message],
        tools: list[Message] | None,
        variables: dict[str, object],
        budget: RenderBudget,
    ) -> str:
        is_continued = bool(variables.pop("continue_final_message"))
        if is_continued and variables["add_generation_prompt"]:
            raise NotRenderable(Obstacle.NOT_A_PROMPT, "add_generation_prompt contradicts continue_final_message")
        final = _mark_final(messages, template.source) if is_continued else ""
        text = template.render({**self._special_tokens, **variables, "messages": messages, "tools": tools}, budget)
        return _cut_at_mark(text, final) if is_continued else text


def _compiled(source: str) -> _Variant:
    try:
        template = CompiledTemplate(source, limit_chars=LIMIT_CHARS)
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"tokens.tokenizer: its chat template does not compile, line {error.lineno}: {error}"
        ) from error
    except (TemplateError, RecursionError) as error:
        raise ConfigError(f"tokens.tokenizer: its chat template does not compile: {error}") from error
    knows_developer = '"developer"' in source or "'developer'" in source
    return _Variant(template, template.content_format, knows_developer)


def _variables(body: Mapping[str, object], wanted: frozenset[str]) -> dict[str, object]:
    """The template's variables besides messages, tools and special tokens; a body's own fields beat its kwargs."""
    kwargs = body.get("chat_template_kwargs")
    if kwargs is not None and not isinstance(kwargs, dict):
        raise NotRenderable(Obstacle.NOT_A_PROMPT, "chat_template_kwargs is not an object")
    kwargs = kwargs or {}
    if not _RESERVED_KWARGS.isdisjoint(kwargs):
        raise NotRenderable(Obstacle.UNKNOWN_FIELD, "chat_template_kwargs")
    fields: dict[str, object] = {
        "add_generation_prompt": _flag(body, "add_generation_prompt", default=True),
        "continue_final_message": _flag(body, "continue_final_message", default=False),
        "documents": body.get("documents"),
        "reasoning_effort": body.get("reasoning_effort"),
    }
    effort = fields["reasoning_effort"]
    if effort is not None and "enable_thinking" not in kwargs:
        fields["enable_thinking"] = effort != "none"
    given = {name: value for name, value in fields.items() if value is not None}
    # vLLM takes None and "auto" for "not given", and passes on only what the template looks up.
    chosen = {name: value for name, value in kwargs.items() if value not in (None, "auto") and name in wanted}
    return {"documents": None} | chosen | given


def _flag(body: Mapping[str, object], name: str, *, default: bool) -> bool:
    value = body.get(name, default)
    if not isinstance(value, bool):
        raise NotRenderable(Obstacle.UNKNOWN_FIELD, name)
    return value


def _without_developer(messages: list[Message]) -> list[Message]:
    """Developer messages as system messages, all system texts merged into one in front."""
    if not any(message["role"] == "developer" for message in messages):
        return messages
    for message in messages:
        if message["role"] == "developer":
            message["role"] = "system"
            message.pop("tools", None)
    systems = [message for message in messages if message["role"] == "system"]
    if systems == messages[:1]:
        return messages
    texts = [text for message in systems if (text := _plain(message["content"]))]
    rest = [message for message in messages if message["role"] != "system"]
    return [{"role": "system", "content": "\n\n".join(texts)}, *rest]


def _plain(content: object) -> str:
    if isinstance(content, list):
        return "\n".join(str(part["text"]) for part in content)
    return str(content)


def _mark_final(messages: list[Message], source: str) -> str:
    """Put a mark behind the last message's text, so that the rendered prompt can be cut there; gives that text."""
    if "content" not in source:
        raise NotRenderable(Obstacle.TEMPLATE_ERROR, "the template does not use the message's content")
    last = messages[-1] = copy.deepcopy(messages[-1])
    content = last["content"]
    if isinstance(content, str):
        last["content"] = content + _CONTINUE_TAG
        return content
    if not isinstance(content, list) or not content:
        raise NotRenderable(Obstacle.NOT_A_PROMPT, "the final message has no text to continue")
    text = str(content[-1]["text"])
    content[-1]["text"] = text + _CONTINUE_TAG
    return text


def _cut_at_mark(text: str, final: str) -> str:
    mark = _CONTINUE_TAG.strip()
    if final.strip() not in text or mark not in text:
        raise NotRenderable(Obstacle.TEMPLATE_ERROR, "the final message does not appear in the prompt")
    at = text.rindex(mark)
    is_spacing_kept = text.startswith(_CONTINUE_TAG, at)
    return text[:at] if is_spacing_kept else text[:at].rstrip()
