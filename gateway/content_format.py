"""Whether a chat template wants message content as a plain string or as OpenAI content parts, told from its syntax.

A template that loops over `message.content` gets the parts; any other gets one string. The rules are vLLM's, loop
by loop, because a different answer is a different prompt.

Source: vLLM 0.32.0, renderers/hf.py `_detect_content_format` and the `_iter_nodes_assign_*` functions above it.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum

from jinja2 import nodes


class ContentFormat(StrEnum):
    """The form of `message.content` a template is given."""

    STRING = "string"
    OPENAI = "openai"


class _OutOfScope(Exception):
    """A loop or assignment has a target that is not one name: vLLM gives up and takes the string format."""


def content_format(template: nodes.Template) -> ContentFormat:
    """The content format vLLM detects for this syntax tree."""
    try:
        has_loop = next(_content_loops(template), None) is not None
    except _OutOfScope:
        return ContentFormat.STRING
    return ContentFormat.OPENAI if has_loop else ContentFormat.STRING


def _content_loops(root: nodes.Template) -> Iterator[nodes.For]:
    messages = list(_message_names(root))
    bound_parameters = _content_parameters(root, messages)
    for loop in root.find_all(nodes.For):
        parameters = bound_parameters.get(id(loop))
        is_direct = any(_reads(loop.iter, message, "content") for message in messages)
        is_through_macro = isinstance(loop.iter, nodes.Name) and loop.iter.name in (parameters or ())
        is_named_content = parameters is None and isinstance(loop.iter, nodes.Name) and loop.iter.name == "content"
        if is_direct or is_through_macro or is_named_content:
            _name_of(loop.target)
            yield loop


def _message_names(root: nodes.Template) -> Iterator[str]:
    lists = list(_aliases(root, "messages"))
    for loop in root.find_all(nodes.For):
        if any(_reads(loop.iter, name) for name in lists):
            yield _name_of(loop.target)


def _aliases(root: nodes.Template, name: str) -> Iterator[str]:
    """The variable and, breadth first, every variable assigned from it, from a slice, a filter or a test of it."""
    yield name
    waiting, seen = [name], {name}
    while waiting:
        source = waiting.pop(0)
        for assignment in root.find_all(nodes.Assign):
            if _reads(assignment.node, source) and (target := _name_of(assignment.target)) not in seen:
                yield target
                waiting.append(target)
                seen.add(target)


def _content_parameters(root: nodes.Template, messages: list[str]) -> dict[int, set[str]]:
    """For each loop inside a macro: the macro's parameters that some call binds to a message's content."""
    found: dict[int, set[str]] = {}
    for macro in root.find_all(nodes.Macro):
        parameters = {parameter for call in _calls(root, macro) for parameter in _bound(call, macro, messages)}
        for loop in macro.find_all(nodes.For):
            found.setdefault(id(loop), set())
            if parameters:
                found[id(loop)] = parameters
    return found


def _calls(root: nodes.Template, macro: nodes.Macro) -> Iterator[nodes.Call]:
    for call in root.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name == macro.name:
            yield call


def _bound(call: nodes.Call, macro: nodes.Macro, messages: list[str]) -> Iterator[str]:
    names = [argument.name for argument in macro.args]
    positional = list(zip(names, call.args, strict=False))
    by_name = [(keyword.key, keyword.value) for keyword in call.kwargs if keyword.key in names]
    for name, value in positional + by_name:
        if any(_reads(value, message, "content") for message in messages):
            yield name


def _reads(node: nodes.Node | None, name: str, key: str | None = None) -> bool:
    """Whether the expression is the variable (or its attribute `key`), maybe sliced, filtered or tested."""
    if isinstance(node, nodes.Filter | nodes.Test):
        return _reads(node.node, name, key)
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        return _reads(node.node, name, key)
    if key is None:
        return isinstance(node, nodes.Name) and node.ctx == "load" and node.name == name
    if isinstance(node, nodes.Getitem):
        return _reads_plainly(node.node, name) and isinstance(node.arg, nodes.Const) and node.arg.value == key
    return isinstance(node, nodes.Getattr) and _reads_plainly(node.node, name) and node.attr == key


def _reads_plainly(node: nodes.Node, name: str) -> bool:
    return isinstance(node, nodes.Name) and node.ctx == "load" and node.name == name


def _name_of(target: nodes.Node) -> str:
    if not isinstance(target, nodes.Name):
        raise _OutOfScope
    return target.name
