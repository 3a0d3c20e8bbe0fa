"""The bodies of the legs: the client's fields, the transfer parameters, and the prompt's token ids where known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from adapters.base import Payload
from adapters.token_ids import with_token_ids

TRANSFER: Final = "kv_transfer_params"
NO_TRANSFER: Final = msgspec.Raw(b"{}")

# The prefill's one token is thrown away, so nothing that only shapes the output or the answer is of use there:
# `stream_options` and `min_tokens` would be refused beside the new limits, the others cost time and bytes. Stop
# conditions stay, for a faulty one is refused before the prompt is computed, but where a connector hands on nothing
# after a finish by stop (`STOPS`).
PREFILL_DROPS: Final = (
    "stream_options",
    "min_tokens",
    "echo",
    "logprobs",
    "top_logprobs",
    "logprob_token_ids",
    "return_token_ids",
    "return_tokens_as_token_ids",
)
STOPS: Final = ("stop", "stop_token_ids", "include_stop_str_in_output")
PREFILL_SETS: Final = {"stream": False, "n": 1, "max_tokens": 1, "max_completion_tokens": 1}
LONG_FIELDS: Final = ("messages", "prompt", "tools")
"""Fields that the legs of a request have in common and that may be long."""
SPLICED_BYTES: Final = 4096
"""Below this a body is encoded faster than it is put together (4 KB: 2 us)."""


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
    spliced = body if payload.body_bytes < SPLICED_BYTES else _spliced(payload, body)
    return msgspec.json.encode(spliced if transfer is NO_TRANSFER else {**spliced, TRANSFER: transfer})


def _spliced(payload: Payload, body: Mapping[str, object]) -> dict[str, object]:
    """The body with its long fields as JSON already: what one leg needed, the next copies (200 KB: 6 us, not 58).

    It is safe because these bytes are ours: the field as it was understood, encoded by the encoder that would encode it
    again, found by the identity of that very value. The client's own bytes are never spliced: of a key that stands
    twice in them an engine might take the other one, and what was checked and hashed here would not be what runs.
    """
    spliced = dict(body)
    for name in LONG_FIELDS:
        if (value := body.get(name)) is None:
            continue
        known = payload.encoded.get(name)
        if known is None or known[0] is not value:
            payload.encoded[name] = known = (value, msgspec.Raw(msgspec.json.encode(value)))
        spliced[name] = known[1]
    return spliced


def prefill(payload: Payload, asks: Mapping[str, object] | None, *, ends_by_length: bool) -> bytes:
    """The prefill leg's body: one token, and what the connector asks for. `ends_by_length`: the one token must not
    end the text, whatever it is, for such a prefill hands nothing on."""
    drops = (*PREFILL_DROPS, *STOPS) if ends_by_length else PREFILL_DROPS
    body = {name: value for name, value in payload.body.items() if name not in drops} | PREFILL_SETS
    if ends_by_length:
        body["ignore_eos"] = True
    return encode(payload, body if asks is None else body | {TRANSFER: dict(asks)})


def joined(one: msgspec.Raw, other: bytes) -> msgspec.Raw:
    """One JSON object with the members of both, which have no name in common."""
    first, second = bytes(one).strip(), other.strip()
    if b"{}" in (first, second):
        return msgspec.Raw(second if first == b"{}" else first)
    return msgspec.Raw(first[:-1] + b"," + second[1:])
