"""vLLM's NIXL connectors: the prefill engine answers with an opaque object that names its blocks for the decode leg.

Pull: the decode engine reads them. They can be read once: the first reader's notification frees the blocks, and a lease
of 30 s frees them anyway, after which a late read may fetch recycled memory without an error. Push: the decode engine
registers itself with the prefill engine, which writes; they find one another by the request id without its random end,
so the next attempt must have another id (`Payload.request_id` has one), or a registration that came late would take
its blocks. Which of the two an engine does its answer says (`transfer_mode`), and the choreography is the same.

Source: vllm 0.32.0, distributed/kv_transfer/kv_connector/v1/nixl/{base,pull,push}_scheduler.py, push_worker.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from adapters.base import Payload
from adapters.vllm.in_turn import Transfer
from gateway.core.errors import MalformedEngineData

ASK_FOR_BLOCKS: Final = {"do_remote_decode": True, "do_remote_prefill": False}

_Name = Annotated[str, Meta(min_length=1)]
_BlockId = Annotated[int, Meta(ge=0)]


class PrefillAnswer(Struct):
    """The one field of a prefill's answer that is passed on."""

    kv_transfer_params: msgspec.Raw = msgspec.Raw(b"null")

    @property
    def is_empty(self) -> bool:
        """Whether nothing is handed on."""
        return bytes(self.kv_transfer_params) in (b"null", b"{}")


class _Transfer(Struct):
    """What a decode engine relies on without checking; the object itself is copied as it came."""

    do_remote_prefill: bool
    remote_block_ids: Annotated[list[_BlockId | list[_BlockId]], Meta(min_length=1)]
    """Per KV-cache group; older versions send one flat list."""
    remote_engine_id: _Name
    remote_request_id: _Name
    remote_host: _Name
    remote_port: Annotated[int, Meta(ge=1, le=65535)]
    tp_size: Annotated[int, Meta(ge=1)] = 1
    do_remote_decode: bool = False
    remote_prefill_cached_tokens: Annotated[int, Meta(ge=0)] | None = None
    transfer_mode: str = "pull"
    """Older versions only pull, and say nothing."""


@dataclass(frozen=True, slots=True)
class Nixl:
    """`mode`: `pull` or `push`, when the engines must do that one; None takes what they say."""

    lease_s: float
    mode: str | None = None
    ends_by_length: bool = False
    """Parameters come with a finish by stop too."""

    def asks(self, payload: Payload) -> dict[str, object]:
        """To keep the blocks for a reader."""
        return dict(ASK_FOR_BLOCKS)

    def transfer(self, answer: bytes) -> Transfer | None:
        """The transfer that a prefill's answer offers; None when it offers none.

        Raises MalformedEngineData when the answer is not JSON or its parameters could harm a decode engine: without
        blocks vLLM's EngineCore dies, with half an address the request is parked for ever.
        """
        try:
            told = msgspec.json.decode(answer, type=PrefillAnswer)
            if told.is_empty:
                return None
            transfer = msgspec.json.decode(told.kv_transfer_params, type=_Transfer)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise MalformedEngineData(f"The prefill engine's answer is not sound: {error}.") from None
        has_blocks = any(group != [] for group in transfer.remote_block_ids)
        if not transfer.do_remote_prefill or transfer.do_remote_decode or not has_blocks:
            raise MalformedEngineData("The prefill engine's transfer parameters name nothing to read.")
        if self.mode not in (None, transfer.transfer_mode):
            raise MalformedEngineData(f"The prefill engine wants to {transfer.transfer_mode}, not to {self.mode}.")
        is_pushed = transfer.transfer_mode == "push"
        return Transfer(told.kv_transfer_params, transfer.remote_prefill_cached_tokens, is_pushed)
