"""The shape of an answer: which keys, of which types, in which order. Two engines speak alike when shapes are equal."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TypeAlias

import msgspec
from prometheus_client.parser import text_string_to_metric_families

OWN_LABELS = ("engine", "model_name")
CACHE_SETTINGS_READ = ("block_size", "num_gpu_blocks", "engine")

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
    """The distinct shapes of a stream's events in order, choice after choice; `str` is the end mark.

    Several choices come interleaved as the engine's steps have it: only the order within each is the same twice.
    """
    events = sse_data(body)
    choices = {choice for event in events if (choice := choice_of(event)) is not None}
    if len(choices) > 1:
        last = max(choices) + 1
        events.sort(key=lambda event: last if (choice := choice_of(event)) is None else choice)
    return distinct([shape(event) for event in events])


def choice_of(event: object) -> int | None:
    """The index of the choice an event belongs to; None for the end mark, usage, errors and events of several."""
    choices = event.get("choices") if isinstance(event, dict) else None
    return choices[0].get("index") if isinstance(choices, list) and len(choices) == 1 else None


def metrics_shape(text: str) -> Shape:
    """Of each metric family its type and its samples' labels, without families that say when another was created."""
    families: dict[str, Shape] = {}
    for family in text_string_to_metric_families(text):
        if not family.name.endswith("_created"):
            samples = [" ".join([sample.name, *labels_shape(family.name, sample.labels)]) for sample in family.samples]
            families[family.name] = {"type": family.type, **dict.fromkeys(samples, "sample")}
    return families


def labels_shape(family: str, labels: dict[str, str]) -> list[str]:
    """The labels as `name=value`, the engine's own as names alone; of its settings those that a router reads."""
    if family == "vllm:cache_config_info":
        return [name for name in sorted(labels) if name in CACHE_SETTINGS_READ]
    return [name if name in OWN_LABELS else f"{name}={value}" for name, value in sorted(labels.items())]


def body_shape(content_type: str, body: bytes) -> Shape:
    """The shape of a body of that content type: JSON, server-sent events or metrics; else whether it is empty."""
    if content_type.startswith("application/json"):
        return shape(json.loads(body))
    if content_type.startswith("text/event-stream"):
        return stream_shape(body)
    if content_type.startswith("text/plain") and body.startswith(b"# HELP"):
        return metrics_shape(body.decode())
    return "text" if body else "empty"


def frames_shape(hex_lines: str) -> Shape:
    """The shape of a KV event batch recorded frame by frame: sizes of topic and number, then the decoded payload."""
    topic, number, payload = (bytes.fromhex(line) for line in hex_lines.split("\n")[:3])
    sent_at, events, rank = msgspec.msgpack.decode(payload)
    shapes = [{**shape(event), "type": event["type"]} for event in events]
    return {"topic": str(len(topic)), "number": str(len(number)), "batch": [shape(sent_at), shapes[0], shape(rank)]}


def recording_differences(expected: Path, got: Path, file: str) -> list[str]:
    """A line for each way in which what one directory recorded under that name differs from what the other did."""
    if file.endswith(".hex"):
        return differences(frames_shape((expected / file).read_text()), frames_shape((got / file).read_text()))
    before, after = exchange(expected, file), exchange(got, file)
    if before != after:
        return [f"{after} instead of {before}"]
    content_type = before["Content-Type"] or ""
    shapes = [body_shape(content_type, (directory / file).read_bytes()) for directory in (expected, got)]
    return differences(*shapes) + error_differences((expected / file).read_bytes(), (got / file).read_bytes())


def exchange(directory: Path, file: str) -> dict[str, object]:
    """Status, content type and framing of a recorded answer."""
    recorded = json.loads((directory / "exchanges.json").read_text())[file]
    headers = recorded["headers"]
    names = ("Content-Type", "Transfer-Encoding")
    return {"status": recorded["status"], **{name: headers.get(name) for name in names}}


def error_differences(expected: bytes, got: bytes) -> list[str]:
    """A line for each field of an error that differs in value. Empty when the body is no error."""
    if expected.startswith(b'{"object":"error"'):  # SGLang's are flat, and name the request and its room
        before, after = (
            {**json.loads(body), "message": anonymous(json.loads(body)["message"])} for body in (expected, got)
        )
    elif expected.startswith(b'{"error"'):
        before, after = json.loads(expected)["error"], json.loads(got)["error"]
    else:
        return []
    return [f"error.{key}: {after[key]!r} instead of {before[key]!r}" for key in before if after[key] != before[key]]


def anonymous(message: str) -> str:
    """The message without the request's own id and room."""
    return re.sub(r"rid='[^']*'", "rid=?", re.sub(r"bootstrap_room=\d+", "bootstrap_room=?", message))
