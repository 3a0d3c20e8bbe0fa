"""The shape of an answer: which keys, of which types, in which order. Two engines speak alike when shapes are equal."""

from __future__ import annotations

import json
from typing import TypeAlias

from prometheus_client.parser import text_string_to_metric_families

Shape: TypeAlias = "str | dict[str, Shape] | list[Shape]"


def shape(value: object) -> Shape:
    """Type names in place of values, in the same nesting; a list becomes the distinct shapes of its items in order."""
    if isinstance(value, dict):
        return {str(key): shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return distinct([shape(item) for item in value])
    return "null" if value is None else type(value).__name__


def distinct(shapes: list[Shape]) -> list[Shape]:
    """The shapes without those that equal the one before."""
    return [item for place, item in enumerate(shapes) if place == 0 or item != shapes[place - 1]]


def differences(expected: Shape, got: Shape, path: str = "") -> list[str]:
    """A line for each place where the shapes differ: missing and surplus keys, other types. Empty when equal."""
    if isinstance(expected, dict) and isinstance(got, dict):
        found = [f"{path}.{key}: missing" for key in expected if key not in got]
        found += [f"{path}.{key}: surplus" for key in got if key not in expected]
        both = [key for key in expected if key in got]
        return found + [line for key in both for line in differences(expected[key], got[key], f"{path}.{key}")]
    if isinstance(expected, list) and isinstance(got, list) and len(expected) == len(got):
        pairs = enumerate(zip(expected, got, strict=True))
        return [line for place, (a, b) in pairs for line in differences(a, b, f"{path}[{place}]")]
    return [] if expected == got else [f"{path}: {got} instead of {expected}"]


def sse_data(body: bytes) -> list[object]:
    """The data of each server-sent event, decoded from JSON, and the string `[DONE]` for the end mark."""
    lines = [line.removeprefix("data: ") for line in body.decode().split("\n\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def stream_shape(body: bytes) -> list[Shape]:
    """The distinct shapes of a stream's events in order; `str` is the end mark."""
    return distinct([shape(data) for data in sse_data(body)])


def metrics_shape(text: str) -> Shape:
    """Of each metric family its type and its samples' label names, without those that say when it was created."""
    families = {}
    for family in text_string_to_metric_families(text):
        if not family.name.endswith("_created"):
            labels = {sample.name: sorted(sample.labels) for sample in family.samples}
            families[family.name] = {"type": family.type, **{name: ",".join(names) for name, names in labels.items()}}
    return families


def body_shape(content_type: str, body: bytes) -> Shape:
    """The shape of a body of that content type: JSON, server-sent events or metrics; else whether it is empty."""
    if content_type.startswith("application/json"):
        return shape(json.loads(body))
    if content_type.startswith("text/event-stream"):
        return stream_shape(body)
    if content_type.startswith("text/plain") and body.startswith(b"# HELP"):
        return metrics_shape(body.decode())
    return "text" if body else "empty"
