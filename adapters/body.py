"""A client's JSON body as a dict that is safe to send on: well-formed, not too deep, no routing-internal fields."""

from __future__ import annotations

from typing import Final

import msgspec
import numpy as np

from gateway.core.errors import BadRequest

# Far above any real tool schema, far below the depth at which Python's own recursion limit would strike on encoding.
MAX_DEPTH: Final = 128

# Fields with which a client could reach into an engine's KV transfer or its scheduler. Several malformed shapes of them
# kill vLLM's EngineCore or SGLang's scheduler (a list in `bootstrap_host`, a negative number in `input_ids`) or park a
# request for ever, so no client may send them.
INTERNAL_FIELDS: Final = frozenset(
    {
        "kv_transfer_params",
        "ec_transfer_params",
        "routed_dp_rank",
        "data_parallel_rank",
        "disagg_prefill_dp_rank",
        "mm_hashes",
        "request_id",
        "rid",
        "input_ids",
        "input_embeds",
        "decode_tp_size",
        "routing_key",
        "mm_content_hashes",
        "session_params",
        "custom_logit_processor",
    }
)
INTERNAL_PREFIX: Final = "bootstrap_"


def decode(raw: bytes) -> dict[str, object]:
    """The body's object; of a duplicate key the last value counts. Raises BadRequest: what is wrong and where."""
    try:
        body = msgspec.json.decode(raw)
    except UnicodeDecodeError:
        raise BadRequest(f"The body is not valid UTF-8 (byte {_first_bad_byte(raw)}).") from None
    except RecursionError:
        raise BadRequest("The body is nested too deep.") from None
    except msgspec.DecodeError as error:
        raise BadRequest(f"The body is not valid JSON: {_json_fault(str(error), len(raw))}.") from None
    if not isinstance(body, dict):
        raise BadRequest("The body must be a JSON object.")
    if _count_brackets(raw) > MAX_DEPTH and _is_deeper_than(body, MAX_DEPTH):
        raise BadRequest(f"The body is nested too deep: more than {MAX_DEPTH} levels.")
    return body


def _first_bad_byte(raw: bytes) -> int:
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        return error.start
    return len(raw)


def _json_fault(message: str, size: int) -> str:
    """What is wrong and where, from msgspec's message."""
    if "truncated" in message:
        return f"it ends within a value or holds half a surrogate pair (byte {size})"
    return message.removeprefix("JSON is malformed: ").replace(" - at `$[...]`", "")


def _count_brackets(raw: bytes) -> int:
    """How many `[` and `{` there are. The two differ in the bit of 0x20. 200 KB: 25 us; two counts, 110."""
    if len(raw) < 8192:
        return raw.count(b"[") + raw.count(b"{")
    return int(np.count_nonzero((np.frombuffer(raw, np.uint8) | 0x20) == ord("{")))


def _is_deeper_than(value: object, limit: int) -> bool:
    """Whether lists and objects nest more than `limit` levels; iterative, for this guards the recursive encoder."""
    level = [value]
    for _ in range(limit):
        level = [child for node in level for child in _children(node)]
        if not level:
            return False
    return True


def _children(node: object) -> list[object]:
    values = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return [child for child in values if isinstance(child, dict | list)]


def strip(body: dict[str, object], strips_cache_salt: bool) -> None:
    """Removes routing-internal fields in place, also from `vllm_xargs`, which vLLM merges with the transfer fields."""
    for fields in (body, body.get("vllm_xargs")):
        if isinstance(fields, dict):
            for name in [name for name in fields if _is_internal(name, strips_cache_salt)]:
                del fields[name]


def _is_internal(name: str, strips_cache_salt: bool) -> bool:
    if name == "cache_salt":
        return strips_cache_salt
    return name in INTERNAL_FIELDS or name.startswith(INTERNAL_PREFIX)
