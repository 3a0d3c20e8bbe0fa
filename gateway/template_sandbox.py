"""Where a chat template runs: the environment transformers gives it, in a sandbox, with bounds on time and size.

The bounds are cooperative, because a thread cannot be stopped from outside: every loop, macro and block body starts
with a `tick` that looks at the clock, and everything printed or built by an operator is counted before it is kept.
The tick is also where the thread lets the event loop have the interpreter: rendering holds it otherwise.

Source: transformers 5.19.0, utils/chat_template_utils.py `_cached_compile_jinja_template` (filters, globals, options).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import wraps
from typing import NoReturn

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_format
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gateway.content_format import content_format

YIELD_EVERY_S = 0.0005
"""How long a render keeps the interpreter at most: a tenth of the 5 ms that the event loop may stall."""

_WIDE_FIELD = re.compile(r"\d{5}|\*")
"""A field width in a format string that could build a text far larger than the format and its arguments."""

_TICK = "_sluice_tick"
_JOIN = "_sluice_join"
_BUDGET = "_sluice_budget"


class RenderLimit(TemplateError):
    """A render went over its time or size, or nobody waits for it any more."""


class RenderBudget:
    """What one render may use: `limit_s` seconds from now and `limit_chars` characters printed."""

    def __init__(self, *, limit_s: float, limit_chars: int, is_abandoned: Callable[[], bool] = lambda: False) -> None:
        self._ends_at = time.perf_counter() + limit_s
        self._yields_at = time.perf_counter() + YIELD_EVERY_S
        self._chars_left = limit_chars
        self._is_abandoned = is_abandoned

    def tick(self, chars: int = 0) -> None:
        """Count `chars` of literal text, give way to other threads now and then; raises RenderLimit."""
        self.charge(chars)
        now = time.perf_counter()
        if now < self._yields_at:
            return
        if now > self._ends_at:
            raise RenderLimit("the chat template ran over its time limit")
        if self._is_abandoned():
            raise RenderLimit("nobody waits for this chat template any more")
        time.sleep(0)  # releases the interpreter lock even when no other thread has asked for it yet
        self._yields_at = time.perf_counter() + YIELD_EVERY_S

    def charge(self, chars: int) -> None:
        """Count characters that are printed or built; raises RenderLimit."""
        self._chars_left -= chars
        if self._chars_left < 0:
            raise RenderLimit("the chat template printed more than its size limit")


@pass_context
def _count_printed(context: Context, value: object) -> object:
    budget = context.parent[_BUDGET]
    budget.charge(len(value) if isinstance(value, str) else 0)
    return value


class _GenerationBlock(Extension):
    """`{% generation %}`: marks the assistant's tokens for training; here it only lets its body through."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it per instance)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        return caller()


class _Environment(ImmutableSandboxedEnvironment):
    """transformers' environment, plus the bounds."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, limit_chars: int) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols])
        self.limit_chars = limit_chars
        self.finalize = _count_printed
        self.filters = {name: self._bounded(function) for name, function in self.filters.items()}
        self.filters["tojson"] = _to_json
        self.filters["format"] = self._bounded(_format)
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.globals[_JOIN] = self._joined
        del self.globals["lipsum"]  # random text without a bound: no prompt that uses it can be foretold

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        _insert_ticks(template)
        template.set_environment(self)
        return template

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        if operator == "%":
            _check_width(left)
        self._check_growth(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: object, *args: object, **kwargs: object) -> object:
        __self._check_arguments(args, kwargs)
        if getattr(__obj, "__name__", "") in ("format", "format_map"):
            _check_width(getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None))
        result = super().call(__context, __obj, *args, **kwargs)
        __self._check_size(result)
        return result

    def _bounded(self, function: Callable[..., object]) -> Callable[..., object]:
        @wraps(function)
        def bounded(*args: object, **kwargs: object) -> object:
            self._check_arguments(args, kwargs)
            result = function(*args, **kwargs)
            self._check_size(result)
            return result

        return bounded

    def _joined(self, *parts: object) -> str:
        texts = [str(part) for part in parts]
        if sum(map(len, texts)) > self.limit_chars:
            raise RenderLimit("the chat template builds a text over its size limit")
        return "".join(texts)

    def _check_growth(self, operator: str, left: object, right: object) -> None:
        sizes = [len(side) for side in (left, right) if isinstance(side, str | list | tuple)]
        numbers = [abs(side) for side in (left, right) if isinstance(side, int)]
        size = sum(sizes)
        if operator == "*" and sizes and numbers:
            size *= numbers[0]
        elif operator == "**" and numbers:
            size = max(numbers)
        if size > self.limit_chars or (operator == "**" and size > 1000):
            raise RenderLimit(f"the chat template builds a value over its size limit with `{operator}`")

    def _check_arguments(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, int) and abs(value) > self.limit_chars:
                raise SecurityError("the chat template passes a number that is over its size limit")

    def _check_size(self, result: object) -> None:
        if isinstance(result, str | list) and len(result) > self.limit_chars:
            raise RenderLimit("the chat template builds a value over its size limit")


def _insert_ticks(template: nodes.Template) -> None:
    for concat in list(template.find_all(nodes.Concat)):
        _replace_by_call(concat)
    for node in template.find_all(nodes.Stmt):
        if isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block):
            literal_chars = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
            call = nodes.Call(nodes.Name(_TICK, "load"), [nodes.Const(literal_chars)], [], None, None)
            node.body.insert(0, nodes.ExprStmt(call, lineno=node.lineno))


def _replace_by_call(concat: nodes.Concat) -> None:
    """Turn `a ~ b` into a call of `_joined`, in place: nodes do not know their parents."""
    parts = concat.nodes
    concat.nodes = [nodes.Call(nodes.Name(_JOIN, "load"), parts, [], None, None, lineno=concat.lineno)]


def _check_width(pattern: object) -> None:
    if isinstance(pattern, str) and _WIDE_FIELD.search(pattern):
        raise SecurityError("the chat template formats with a field width over its size limit")


def _format(pattern: str, *args: object, **kwargs: object) -> str:
    _check_width(pattern)
    return do_format(pattern, *args, **kwargs)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    # Local wall-clock time without a zone, because that is what the engine's own template sees.
    return datetime.now().strftime(pattern)  # noqa: DTZ005


class CompiledTemplate:
    """A chat template ready to render, from any thread. Raises jinja2.TemplateSyntaxError when it cannot compile."""

    def __init__(self, source: str, *, limit_chars: int) -> None:
        self.source = source
        self._environment = _Environment(limit_chars)
        self._template = self._environment.from_string(source)
        tree = self._environment.parse(source)
        self.content_format = content_format(tree)
        self.variables = frozenset(find_undeclared_variables(tree)) - {_TICK}
        """The names it looks up that it does not set itself."""

    def render(self, variables: Mapping[str, object], budget: RenderBudget) -> str:
        """The prompt text. Raises jinja2.TemplateError, RenderLimit among them, and what the template's code raises."""
        pieces = self._template.generate(**variables, **{_BUDGET: budget, _TICK: budget.tick})
        return "".join(pieces)
