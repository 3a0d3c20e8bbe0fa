"""Bodies of the legs: what is encoded once is what each leg would have encoded."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from adapters.base import Payload
from adapters.openai import CHAT, parse
from adapters.vllm.bodies import SPLICED_BYTES, TRANSFER, encode

TRANSFER_PARAMS = msgspec.Raw(b'{"do_remote_prefill": true}')


def a_chat(text: str) -> Payload:
    fields = {"model": "m", "messages": [{"role": "user", "content": text}], "tools": [{"type": "function"}]}
    return parse(CHAT, msgspec.json.encode(fields), request_id="r")


@pytest.mark.parametrize("size", [10, SPLICED_BYTES, 10 * SPLICED_BYTES])
@pytest.mark.parametrize("transfer", [None, TRANSFER_PARAMS])
def test_every_leg_gets_the_fields_as_they_were_understood(size: int, transfer: msgspec.Raw | None) -> None:
    payload = a_chat('"\\ü' * size)
    told = {} if transfer is None else {TRANSFER: {"do_remote_prefill": True}}
    for _ in range(2):
        body = encode(payload, payload.body) if transfer is None else encode(payload, payload.body, transfer)
        assert msgspec.json.decode(body) == payload.body | told


def test_a_leg_with_another_prompt_never_gets_the_first_ones() -> None:
    payload = a_chat("x" * SPLICED_BYTES)
    encode(payload, payload.body)
    other = replace(payload, body=payload.body | {"messages": [{"role": "user", "content": "other"}]})
    assert msgspec.json.decode(encode(other, other.body)) == other.body
    assert msgspec.json.decode(encode(payload, payload.body)) == payload.body


def test_of_a_key_that_stands_twice_engines_only_see_the_one_that_was_understood() -> None:
    filler = "x" * SPLICED_BYTES
    raw = '{"model": "m", "messages": [{"role": "user", "content": "first", "content": "' + filler + '"}]}'
    body = encode(payload := parse(CHAT, raw.encode(), request_id="r"), payload.body)
    assert b"first" not in body
    assert msgspec.json.decode(body)["messages"][0]["content"] == filler
