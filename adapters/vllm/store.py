"""vLLM's store connectors: the prefill engine saves its KV where the decode engine looks, and nobody need say a word.

ExampleConnector, MooncakeStore, LMCache, Offloading, HF3FS, FlexKV: one token on the prefill engine, then the client's
request on the decode engine, which finds the prompt's blocks by their hashes. It must begin after the prefill's answer,
for it looks once. Nothing is kept for one reader: nothing can be stranded, and a decode that fails is asked again.

Source: vllm 0.32.0, distributed/kv_transfer/kv_connector/v1/example_connector.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from adapters.base import Payload
from adapters.vllm.in_turn import Transfer


@dataclass(frozen=True, slots=True)
class Store:
    """Says nothing, takes nothing."""

    lease_s: float | None = None
    ends_by_length: bool = False

    def asks(self, payload: Payload) -> None:
        """Nothing."""

    def transfer(self, answer: bytes) -> Transfer | None:
        """Nothing: the store has it."""
        return None
