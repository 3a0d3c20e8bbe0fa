"""Bodies in OpenAI's shape: the errors and model list we write, and the usage we read from an engine's answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct

from gateway.core.errors import GatewayError

DONE_EVENT: Final = b"data: [DONE]\n\n"


def error_body(
    message: str,
    kind: str,
    param: str | None = None,
    code: int | str | None = None,
    numbers: Mapping[str, float] | None = None,
) -> bytes:
    """The JSON body of a refusal: `{"error": {"message", "type", "param", "code"}}`, and `numbers` where there are."""
    error: dict[str, object] = {"message": message, "type": kind, "param": param, "code": code}
    return msgspec.json.encode({"error": error | ({"numbers": dict(numbers)} if numbers else {})})


def refusal(error: GatewayError) -> bytes:
    """The JSON body of an error raised on purpose, its status as the code where it has none of its own."""
    return error_body(error.message, error.kind, error.param, error.code or error.status)


def error_event(error: GatewayError) -> bytes:
    """One SSE error event and the end of the stream, for failures after the first byte left."""
    return b"data: " + refusal(error) + b"\n\n" + DONE_EVENT


def models_body(max_model_tokens: Mapping[str, int | None], *, created: int) -> bytes:
    """The model list: one entry per name, sorted, with the longest context (tokens) where known.

    `created` is a Unix time in seconds, the same for all: engines invent theirs at every answer.
    """
    entries = [
        {"id": name, "object": "model", "created": created, "owned_by": "sluice", "max_model_len": limit}
        for name, limit in sorted(max_model_tokens.items())
    ]
    return msgspec.json.encode({"object": "list", "data": entries})


class Usage(Struct, frozen=True):
    """Token counts an engine told of one request; None where it did not say."""

    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None


_Count = Annotated[int, Meta(ge=0)]


class _Details(Struct):
    cached_tokens: _Count | None = None


class _Usage(Struct):
    prompt_tokens: _Count | None = None
    completion_tokens: _Count | None = None
    prompt_tokens_details: _Details | None = None
    input_tokens: _Count | None = None
    output_tokens: _Count | None = None
    input_tokens_details: _Details | None = None


class _Holder(Struct):
    usage: _Usage | None = None


class _Answer(Struct):
    usage: _Usage | None = None
    response: _Holder | None = None
    """Where `/v1/responses` puts it in its last stream event."""


_ANSWER: Final = msgspec.json.Decoder(_Answer)


def usage(data: bytes) -> Usage | None:
    """Token counts in a whole answer or in the data of one stream event; None when it tells none or is not JSON."""
    try:
        answer = _ANSWER.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    found = answer.usage or (answer.response.usage if answer.response else None)
    if found is None:
        return None
    details = found.prompt_tokens_details or found.input_tokens_details
    return Usage(
        prompt_tokens=found.input_tokens if found.prompt_tokens is None else found.prompt_tokens,
        output_tokens=found.output_tokens if found.completion_tokens is None else found.completion_tokens,
        cached_tokens=details.cached_tokens if details else None,
    )


class _ErrorBody(Struct):
    class Error(Struct):
        message: str

    error: Error | None = None
    detail: Any = None
    """Where the web framework under an engine puts its own refusals."""
    object: Any = None
    message: Any = None
    type: Any = None
    param: Any = None
    """SGLang's errors are flat: `{"object": "error", "message", "type", "param", "code"}`."""


def client_error_body(status: int, body: bytes) -> bytes:
    """An engine's own error body as it is when it has OpenAI's shape, else a plain one in its place."""
    try:
        told = msgspec.json.decode(body, type=_ErrorBody)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        told = _ErrorBody()
    if told.error is not None:
        return body
    if told.object == "error" and isinstance(told.message, str):
        return _nested(status, told)
    said = f": {told.detail}" if isinstance(told.detail, str) else ""
    message = f"The engine refused the request with status {status}{said}."
    return error_body(message, "invalid_request_error", code=status)


def _nested(status: int, told: _ErrorBody) -> bytes:
    """A flat error in OpenAI's shape, without the engine's own source file and line that validation errors end with."""
    message = told.message.partition('\n\n  File "')[0]
    kind = told.type if isinstance(told.type, str) else "invalid_request_error"
    return error_body(message, kind, told.param if isinstance(told.param, str) else None, status)
