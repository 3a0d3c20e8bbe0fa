"""TOML text to frozen structs and back, strictly: whatever is wrong is a ConfigError that starts with the key's path.

A walk over the struct's fields instead of one `msgspec.convert` of the whole tree, because a refusal must name the
key's path, what is allowed there and the known keys beside it, and must never repeat a secret.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import tomllib
from collections.abc import Mapping
from enum import StrEnum
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import fields

from gateway.core.errors import ConfigError

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]{1,64}")
_VARIABLE = re.compile(r"\$\$\{|\$\{([^}]*)(\}?)")
_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MAX_DEPTH = 8
_MAX_ROWS = 10_000
_MAX_FILE_BYTES = 4 * 2**20
_KINDS = {str: "a string", int: "an integer", float: "a number", bool: "true or false", list: "a list", dict: "a table"}

_Table = TypeVar("_Table", bound=Struct)


class Secret:
    """A string that no log, traceback or `render` shows: it prints as `***`. `reveal()` gives it."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The string itself."""
        return self._value

    def __repr__(self) -> str:
        return "***"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._value == other._value

    def __hash__(self) -> int:
        return hash((Secret, self._value))


def read_text(path: str) -> str:
    """The text of a file of at most 4 MiB. Raises ConfigError that starts with the file's path."""
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(content) > _MAX_FILE_BYTES:
        raise ConfigError(f"{path}: larger than {_MAX_FILE_BYTES} bytes")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from None


def parse(text: str) -> dict[str, object]:
    """The tables of TOML `text`. Raises ConfigError with the line."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ConfigError("not TOML that can be read: nested too deeply") from None
    except ValueError as error:  # TOMLDecodeError, or an integer of more digits than Python converts
        raise ConfigError(f"not TOML: {error}") from None


def parse_json(text: str) -> dict[str, object]:
    """The object of JSON `text`. Raises ConfigError."""
    try:
        return msgspec.json.decode(text, type=dict[str, object])
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise ConfigError(f"not a JSON object: {error}") from None


# ---- reading ---------------------------------------------------------------------------------------------------------


def read(kind: type[_Table], table: Mapping[str, object], environ: Mapping[str, str], path: str = "") -> _Table:
    """A `kind` with the values of `table`, `${NAME}` filled in from `environ`. Raises ConfigError."""
    known = {field.name: field for field in fields(kind)}
    for key in table:
        if key not in known:
            raise ConfigError(_unknown_key(key, sorted(known), path))
    for field in known.values():
        if field.required and field.name not in table:
            raise ConfigError(f"{_join(path, field.name)}: missing; expected {describe(field.type)}")
    return kind(**{key: _read_value(known[key].type, table[key], environ, _join(path, key)) for key in table})


def read_field(kind: type[Struct], key: str, value: object, path: str) -> object:
    """`value` as the field `key` of `kind` takes it, without `${NAME}`. Raises ConfigError starting with `path`."""
    (found,) = (field for field in fields(kind) if field.name == key)
    return _convert(found.type, value, value, path)


def _read_value(kind: Any, value: object, environ: Mapping[str, str], path: str) -> object:
    if get_origin(kind) is tuple:
        row_kind = get_args(kind)[0]
        if not isinstance(value, list) or len(value) > _MAX_ROWS:
            rows = f"[[{path}]] tables" if isinstance(row_kind, type) and issubclass(row_kind, Struct) else "a list"
            raise ConfigError(f"{path}: expected {rows}, at most {_MAX_ROWS}, got {show(value)}")
        return tuple(_read_value(row_kind, row, environ, f"{path}[{i}]") for i, row in enumerate(value))
    if isinstance(kind, type) and issubclass(kind, Struct):
        if not isinstance(value, dict):
            raise ConfigError(f"{path}: expected a table, got {show(value)}")
        return read(kind, value, environ, path)
    if get_origin(kind) is Mapping:
        if not isinstance(value, dict):
            raise ConfigError(f"{path}: expected a table, got {show(value)}")
        return _read_free(value, environ, path)
    return _convert(kind, substitute(value, environ, path) if isinstance(value, str) else value, value, path)


def _convert(kind: Any, value: object, written: object, path: str) -> object:
    """`value` as `kind`; a refusal shows it as it was `written`, so that no environment variable's value leaks."""
    is_finite = not isinstance(value, float) or math.isfinite(value)
    try:
        if is_finite:
            return msgspec.convert(value, kind, dec_hook=_make_secret)
    except (msgspec.ValidationError, OverflowError):
        pass
    got = "another value" if kind is Secret or Secret in get_args(kind) else show(written)
    raise ConfigError(f"{path}: expected {describe(kind)}, got {got}")


def _make_secret(kind: type, value: object) -> Secret:
    # It ends up in a header: a line break in it (a file's last one, say) would be a second header.
    if isinstance(value, str) and re.fullmatch(r"[!-~]{1,4096}", value):
        return Secret(value)
    raise ValueError


def _read_free(value: object, environ: Mapping[str, str], path: str, depth: int = 0) -> object:
    """A plug-in's own settings: strings, finite 64-bit numbers, booleans, lists and tables of these."""
    if depth > _MAX_DEPTH:
        raise ConfigError(f"{path}: nested deeper than {_MAX_DEPTH} levels")
    if isinstance(value, str):
        return substitute(value, environ, path)
    if isinstance(value, dict):
        return {key: _read_free(inner, environ, _join(path, key), depth + 1) for key, inner in value.items()}
    if isinstance(value, list):
        return [_read_free(inner, environ, f"{path}[{i}]", depth + 1) for i, inner in enumerate(value)]
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise ConfigError(f"{path}: expected a string, boolean, finite 64-bit number, list or table, got {show(value)}")


def substitute(text: str, environ: Mapping[str, str], path: str) -> str:
    """`text` with each `${NAME}` replaced by that environment variable. Raises ConfigError when it is not set."""

    def value_of(match: re.Match[str]) -> str:
        name, end = match.group(1), match.group(2)
        if name is None:
            return "${"
        if not end or not _VARIABLE_NAME.fullmatch(name):
            raise ConfigError(f"{path}: expected ${{NAME}} with a variable's name, or $${{ for a literal ${{")
        if name not in environ:
            raise ConfigError(f"{path}: the environment variable {name} is not set")
        return environ[name]

    return _VARIABLE.sub(value_of, text)


# ---- words for refusals ----------------------------------------------------------------------------------------------


def _join(path: str, key: str) -> str:
    name = key if _BARE_KEY.fullmatch(key) else show(key)
    return f"{path}.{name}" if path else name


def _unknown_key(key: str, known: list[str], path: str) -> str:
    close = difflib.get_close_matches(key[:64], known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    place = f"[{path}]" if path else "the top level"
    return f"{_join(path, key)}: unknown key; {hint}{place} knows {', '.join(known)}"


def show(value: object) -> str:
    """`value` in a message: one short line, whatever it is."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 64:
        return "an integer of more than 64 bits"
    if isinstance(value, list | dict):
        return _KINDS[type(value)]
    text = json.dumps(value) if isinstance(value, str | bool) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def describe(kind: Any) -> str:
    """What a field of this type takes, in words: its kind, range or choices."""
    if get_origin(kind) in (UnionType, Union):
        (kind,) = (option for option in get_args(kind) if option is not NoneType)
    if get_origin(kind) is Annotated:
        base, meta = get_args(kind)
        return meta.description or f"{_KINDS[base]}{_describe_range(meta)}"
    if kind is Secret:
        return "1 to 4096 visible ASCII characters"
    if issubclass(kind, StrEnum):
        return f"one of {', '.join(kind)}"
    return _KINDS[kind]


def _describe_range(meta: Meta) -> str:
    if meta.min_length is not None:
        return f" of {meta.min_length} to {meta.max_length} characters"
    low = f"{meta.ge} <= " if meta.ge is not None else f"{meta.gt} < "
    high = f" <= {meta.le}" if meta.le is not None else f" < {meta.lt}"
    return f", {low}value{high}"


# ---- writing ---------------------------------------------------------------------------------------------------------


def render(config: Struct) -> str:
    """TOML text of a struct of tables, every value printed; what is not set stands as a comment."""
    lines: list[str] = []
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, tuple):
            for row in value:
                lines += [f"[[{field.name}]]", *_render_table(row), ""]
        else:
            lines += [f"[{field.name}]", *_render_table(value), ""]
    return "\n".join(lines)


def _render_table(table: Struct) -> list[str]:
    values = ((field.name, getattr(table, field.name)) for field in fields(table))
    return [f"# {key}: not set" if value is None else f"{key} = {_render_value(value)}" for key, value in values]


def _render_value(value: object) -> str:
    if isinstance(value, Secret):
        return '"***"'
    if isinstance(value, str):
        return _quote(value.replace("${", "$${"))
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        pairs = (f"{_quote_key(key)} = {_render_value(inner)}" for key, inner in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_render_value, value)) + "]"
    return repr(value)


def _quote(text: str) -> str:
    # A JSON string is a TOML string but for DEL, which TOML wants escaped.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _quote_key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _quote(key)
