"""The table of all settings in Markdown, made of the structs and the docstrings under their fields.

`python -m gateway.config_reference` prints it, with `--write README.md` it goes between that file's two markers; a test
keeps both the same.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from typing import get_args

import msgspec

from gateway.config import Config, EngineSettings
from gateway.readme_tables import main


def field_docs(kind: type[msgspec.Struct]) -> dict[str, str]:
    """Field name -> the text under it, on one line."""
    (definition,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(definition, ast.ClassDef)
    docs: dict[str, str] = {}
    for node, after in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(after, ast.Expr):
            docs[node.target.id] = " ".join(str(ast.literal_eval(after.value)).split())
    return docs


def tables() -> Iterator[tuple[str, type[msgspec.Struct]]]:
    """Each table of the configuration file with its struct, `[[engines]]` first."""
    yield "[[engines]]", EngineSettings
    for field in msgspec.structs.fields(Config):
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            yield f"[{field.name}]", field.type
        elif field.name != "engines":
            yield f"[[{field.name}]]", get_args(field.type)[0]


def default_of(field: msgspec.structs.FieldInfo) -> str:
    """The default as it would stand in the file."""
    if field.required:
        return "required"
    value = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{msgspec.json.encode(value).decode()}`"


def render() -> str:
    """The reference: for each table one Markdown table of keys, defaults and meanings."""
    parts: list[str] = []
    for name, kind in tables():
        docs = field_docs(kind)
        rows = [
            f"| `{field.name}` | {default_of(field)} | {docs[field.name]} |" for field in msgspec.structs.fields(kind)
        ]
        heading = inspect.cleandoc(kind.__doc__ or "").splitlines()[0]
        parts.append(
            "\n".join([f"**`{name}`** {heading}", "", "| key | default | meaning |", "| --- | --- | --- |", *rows])
        )
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main(sys.argv[1:], "settings", render())
