"""Short names for exchanges, so that tests read like transcripts; and the recorded bytes of real engines."""

from __future__ import annotations

from pathlib import Path

import msgspec

from adapters.base import (
    Answer,
    Answered,
    Broken,
    Call,
    Cause,
    Command,
    Commit,
    Expect,
    Hangup,
    HeadEvent,
    Leg,
    Prefilled,
    Retry,
)
from adapters.openai import CHAT, parse
from gateway.core.types import Engine, Role

VLLM = Path(__file__).parent.parent / "recorded" / "vllm-0.32"
SGLANG = Path(__file__).parent.parent / "recorded" / "sglang-0.5.23"

P, D, B = (
    Engine(name, f"http://{name}", role) for name, role in (("p", Role.PREFILL), ("d", Role.DECODE), ("b", Role.BOTH))
)

TRANSFER = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_block_ids": [[12, 13, 14]],
    "remote_engine_id": "6f",
    "remote_request_id": "chatcmpl-r1-1a2b3c4d",
    "remote_host": "10.0.0.5",
    "remote_port": 5600,
    "tp_size": 1,
}


def payload(*, path=CHAT, stream=True, headers=(), **fields):
    """A chat request of one word, as the client would send it."""
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": stream} | fields
    return parse(path, msgspec.json.encode(body), headers, request_id="r1")


def prefilled(**changes):
    """A prefill answer with sound transfer parameters, but for the changes; `None` leaves a field out."""
    params = {name: value for name, value in (TRANSFER | changes).items() if value is not None}
    return Answered(Leg.PREFILL, 200, msgspec.json.encode({"id": "x", "kv_transfer_params": params}))


def answered(leg, status, body=b'{"error":{"message":"no","type":"t","param":null,"code":0}}'):
    return Answered(leg, status, body)


def broken(leg, cause=Cause.LOST):
    return Broken(leg, cause)


def token(text="a"):
    return HeadEvent(Leg.DECODE, msgspec.json.encode({"choices": [{"delta": {"content": text}}]}))


def error_event(code):
    return HeadEvent(Leg.DECODE, msgspec.json.encode({"error": {"message": "no", "code": code}}))


def said(commands: list[Command]) -> str:
    """The commands in short: `call d`, `retry p`, `retry p down`, `answer 400`, `commit`, `hangup`, `note`."""
    return ", ".join(map(_said, commands))


def _said(command: Command) -> str:
    match command:
        case Call():
            return f"call {command.engine.id}"
        case Retry():
            return f"retry {command.engine_id}" + (" down" if command.is_engine_down else "")
        case Answer():
            return f"answer {command.status}"
        case Commit() | Expect() | Hangup() | Prefilled():
            return type(command).__name__.lower()
