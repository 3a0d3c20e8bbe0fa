"""vLLM's MoRIIOConnector in READ mode: the prefill's answer says where the decode engine reads, under an id of ours.

(In WRITE mode, its default, the prefill engine must know the decode engine's ZMQ address beforehand, which engines tell
only to a proxy that they register with: start them with `"read_mode": true`.) A prefill that does not end by its length
hands nothing on.

Source: vllm 0.32.0, distributed/kv_transfer/kv_connector/v1/moriio/moriio_connector.py `request_finished`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from adapters.base import Payload
from adapters.vllm.in_turn import Transfer
from adapters.vllm.nixl import PrefillAnswer
from gateway.core.errors import MalformedEngineData

_Name = Annotated[str, Meta(min_length=1)]
_Port = Annotated[int, Meta(ge=1, le=65535)]


class _Transfer(Struct):
    """What a decode engine relies on; where one is missing its scheduler raises."""

    do_remote_prefill: bool
    remote_block_ids: Annotated[list[int | list[int]], Meta(min_length=1)]
    remote_engine_id: _Name
    remote_host: _Name
    remote_handshake_port: _Port
    remote_notify_port: _Port
    transfer_id: _Name
    do_remote_decode: bool = False


@dataclass(frozen=True, slots=True)
class Moriio:
    """`lease_s`: within which the decode engine has to show that it has the request."""

    lease_s: float
    ends_by_length: bool = True

    def asks(self, payload: Payload) -> dict[str, object]:
        """To keep the blocks for the reader with this id."""
        return {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": f"xfer-{payload.request_id}"}

    def transfer(self, answer: bytes) -> Transfer | None:
        """The transfer that a prefill's answer offers; None when it offers none. Raises MalformedEngineData."""
        try:
            told = msgspec.json.decode(answer, type=PrefillAnswer)
            if told.is_empty:
                return None
            transfer = msgspec.json.decode(told.kv_transfer_params, type=_Transfer)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise MalformedEngineData(f"The prefill engine's answer is not sound: {error}.") from None
        if not transfer.do_remote_prefill or transfer.do_remote_decode:
            raise MalformedEngineData("The prefill engine's transfer parameters name nothing to read.")
        return Transfer(told.kv_transfer_params, None)
