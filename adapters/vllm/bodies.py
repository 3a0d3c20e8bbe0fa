"""The bodies of the legs: the client's fields, the transfer parameters, and the prompt's token ids where known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from adapters.base import Payload
from adapters.token_ids import with_token_ids

TRANSFER: Final = "kv_transfer_params"
NO_TRANSFER: Final = msgspec.Raw(b"{}")


def encode(payload: Payload, body: Mapping[str, object], transfer: msgspec.Raw = NO_TRANSFER) -> bytes:
    """The leg's body as JSON. `transfer` is an object as an engine sent it: its bytes go into the body unchanged.

    Token ids spare the engine its tokenizer: they replace a completion's prompt, and stand beside the transfer
    parameters of a chat. Source: vllm 0.32.0, renderers/online_renderer.py `_reused_prompt_token_ids`.
    """
    if payload.token_ids is not None:
        body = with_token_ids(body, payload.token_ids, "vllm")
    own = body.get(TRANSFER)
    if own is not None:
        transfer = joined(transfer, msgspec.json.encode(own))
    return msgspec.json.encode(body if transfer is NO_TRANSFER else {**body, TRANSFER: transfer})


def joined(one: msgspec.Raw, other: bytes) -> msgspec.Raw:
    """One JSON object with the members of both, which have no name in common."""
    first, second = bytes(one).strip(), other.strip()
    if b"{}" in (first, second):
        return msgspec.Raw(second if first == b"{}" else first)
    return msgspec.Raw(first[:-1] + b"," + second[1:])
