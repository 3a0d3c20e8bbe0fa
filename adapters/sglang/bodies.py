"""The bodies of the legs: the client's fields, an id, the prompt's token ids where known, the room of a hand-off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final
from urllib.parse import urlsplit

import msgspec

from adapters.base import Payload
from adapters.token_ids import with_token_ids
from gateway.core.types import Engine

BOOTSTRAP_PORT: Final = "bootstrap_port"
"""Name of the fact: where the settings say that a prefill engine's bootstrap server is."""
TOLD_BOOTSTRAP_PORT: Final = "disaggregation_bootstrap_port"
"""Name of the fact: where the engine itself says that it is."""
DEFAULT_BOOTSTRAP_PORT: Final = 8998
LOW_PRIORITY_FIRST: Final = "schedule_low_priority_values_first"
VOCABULARY_TOKENS: Final = "vocabulary_tokens"
"""Name of the fact: how many token ids the model has, as the settings say: no page of the engine tells."""
ABORT_PATH: Final = "/abort_request"

# The prefill leg is the client's request but for how it is answered, which is for nobody. What shapes the one token
# stays, for the decode engine gets that token and its log probabilities from the prefill engine.
PREFILL_DROPS: Final = ("stream_options",)
PREFILL_SETS: Final = {"stream": False}


def common(payload: Payload, engine: Engine, rid: str) -> dict[str, object]:
    """The fields of every leg.

    Lower is earlier in the priorities that clients send, as in vLLM, and later in SGLang unless it was told otherwise.
    An adapter of a served model goes by its own name here, which SGLang knows as `lora_path` only: under an unknown
    `model` it answers with the base model.
    """
    body = dict(payload.body)
    if payload.token_ids is not None:
        body = with_token_ids(body, payload.token_ids, "sglang")
    priority = body.get("priority")
    if type(priority) is int and not engine.details.get(LOW_PRIORITY_FIRST):
        body["priority"] = -priority
    if payload.model in engine.lora_names:
        body["lora_path"] = payload.model
    return body | {"rid": rid}


def token_beyond(payload: Payload, engine: Engine) -> int | None:
    """A token id of the client's that the model does not have: the scheduler dies of it. None where none is known."""
    vocabulary, prompt = engine.details.get(VOCABULARY_TOKENS), payload.body.get("prompt")
    if not isinstance(vocabulary, int) or not isinstance(prompt, list):
        return None
    prompts = [part if isinstance(part, list) else [part] for part in prompt]
    highest = max((token for part in prompts for token in part if type(token) is int), default=0)
    return highest if highest >= vocabulary else None


def decode(payload: Payload, engine: Engine, rid: str, room: Mapping[str, object]) -> bytes:
    """The leg that answers the client; `room` is empty where nothing is handed off."""
    return msgspec.json.encode({**common(payload, engine, rid), **room})


def prefill(payload: Payload, engine: Engine, rid: str, room: Mapping[str, object]) -> bytes:
    """The leg that computes the prompt. SGLang ends it after one token by itself."""
    body = {**common(payload, engine, rid), **PREFILL_SETS, **room}
    return msgspec.json.encode({name: value for name, value in body.items() if name not in PREFILL_DROPS})


def bootstrap(prefill: Engine, room: int) -> dict[str, object]:
    """Where the decode engine finds the prefill engine, and the room in which the two legs meet: the same in both.

    Always one value each: lists, which SGLang takes for batches, kill the scheduler of a single request.
    """
    port = prefill.details.get(BOOTSTRAP_PORT) or prefill.details.get(TOLD_BOOTSTRAP_PORT) or DEFAULT_BOOTSTRAP_PORT
    return {"bootstrap_host": urlsplit(prefill.url).hostname, "bootstrap_port": port, "bootstrap_room": room}


def abort(rid: str) -> tuple[str, bytes]:
    """Path and body of the call that ends the request at once.

    A closed connection is noticed within 4 s (a stream's, 2 s), this within a step: measured on a real pair, waiting,
    transferring and decoding. Source: sglang 0.5.23, managers/tokenizer_manager.py `_stream_one_response`.
    """
    return ABORT_PATH, msgspec.json.encode({"rid": rid})
