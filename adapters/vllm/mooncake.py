"""vLLM's MooncakeConnector: both legs at once, which meet by a transfer id and the prefill engine's bootstrap server.

`GET http://prefill:8998/query` tells the engine's id for each of its data-parallel ranks; it is another one after each
start. The prefill leg must end by its length: a text that ends with its first token hands nothing on, and the decode
engine would wait 480 s for it. An id serves one attempt.

Source: vllm 0.32.0, distributed/kv_transfer/kv_connector/v1/mooncake/mooncake_{connector,utils}.py.
"""

from __future__ import annotations

from typing import Final
from urllib.parse import urlsplit
from zlib import crc32

import msgspec
from msgspec import Struct

from adapters import verdict
from adapters.at_once import AtOnce, CannotHandOff
from adapters.base import Call, Exchange, Leg, Payload, Retry
from adapters.vllm import bodies
from gateway.core.errors import MalformedEngineData
from gateway.core.types import Engine

BOOTSTRAP_PORT: Final = 8998
"""Default of VLLM_MOONCAKE_BOOTSTRAP_PORT."""
RANK_HEADER: Final = "X-data-parallel-rank"
MAX_RANKS: Final = 1024


class _Entry(Struct):
    engine_id: str


class _Choice(Struct):
    finish_reason: str | None = None


class _Answer(Struct):
    choices: list[_Choice] = []


def bootstrap_address(engine: Engine) -> str:
    """Where the engine's bootstrap server is, as a URL without path."""
    return engine.transfer_address or f"http://{_host(engine.url)}:{BOOTSTRAP_PORT}"


def _host(url: str) -> str:
    host = urlsplit(url).hostname or ""
    return f"[{host}]" if ":" in host else host


def parse_query(body: bytes) -> tuple[str, ...]:
    """The engine ids by data-parallel rank, at least one. Raises MalformedEngineData."""
    try:
        entries = msgspec.json.decode(body, type=dict[int, _Entry])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedEngineData(f"The bootstrap server's answer is not sound: {error}.") from None
    ids = [entries[rank].engine_id for rank in sorted(entries)]
    if not ids or sorted(entries) != list(range(len(ids))) or len(ids) > MAX_RANKS or not all(ids):
        raise MalformedEngineData("The bootstrap server does not know its engine's ranks yet.")
    return tuple(ids)


def open_mooncake(payload: Payload, prefill: Engine, decode: Engine, hand_off_s: float) -> Exchange:
    """Both legs of one attempt."""
    if not prefill.transfer_ids:
        return CannotHandOff(Retry(prefill.id, "prefill_unknown_transfer_id"))
    rank = crc32(payload.request_id.encode()) % len(prefill.transfer_ids)
    transfer_id = f"xfer-{payload.request_id}"
    sends = {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": transfer_id}
    takes = {
        "do_remote_decode": False,
        "do_remote_prefill": True,
        "transfer_id": transfer_id,
        "remote_bootstrap_addr": bootstrap_address(prefill),
        "remote_engine_id": prefill.transfer_ids[rank],
    }
    headers = verdict.leg_headers(payload)
    pinned = ((RANK_HEADER, str(rank)),) if len(prefill.transfer_ids) > 1 else ()
    send = bodies.prefill(payload, sends, ends_by_length=True)
    take = bodies.encode(payload, payload.body, msgspec.Raw(msgspec.json.encode(takes)))
    return AtOnce(
        Call(Leg.PREFILL, prefill, payload.path, send, (*headers, *pinned), is_replayable=False),
        Call(
            Leg.DECODE,
            decode,
            payload.path,
            take,
            headers,
            is_answer=True,
            is_replayable=False,
            waits_for=prefill.id,
        ),
        hand_off_s if payload.is_stream else None,
        ends_by_length,
    )


def ends_by_length(answer: bytes) -> bool:
    """Whether the prefill's answer says that it stopped because its one token was there, and for no other reason."""
    try:
        choices = msgspec.json.decode(answer, type=_Answer).choices
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return bool(choices) and all(choice.finish_reason == "length" for choice in choices)
