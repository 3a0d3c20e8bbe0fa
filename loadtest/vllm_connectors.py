"""What an emulated engine does with KV besides NIXL pull, and how that fails.

- **NIXL push**: the decode engine waits for the prefill engine's write, found by the request's base id. Where the
  prefill engine is gone or holds nothing any more it waits on: 480 s, `decoder_kv_blocks_ttl`.
- **Mooncake**: the same, found by transfer id, from a prefill that may not even have begun; only a prefill that ended
  by its length is ever sent. A body of the wrong role kills the engine.
- **Store**: what any engine computed lies in a folder; an engine that finds its prompt there loads it before it starts.

Waiting is done before a request enters the engine, so the blocks that a real decode engine keeps meanwhile are not
taken. Source: vllm 0.32.0, nixl/push_{scheduler,worker}.py, mooncake/mooncake_connector.py, example_connector.py.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from gateway.core.types import Role
from loadtest.engine_types import EngineRequest, Finished, FinishReason, RemoteKv
from loadtest.kv_content import BlockContent, block_keys
from loadtest.vllm_requests import Generation, remote_kv
from loadtest.vllm_shapes import kv_params

if TYPE_CHECKING:
    from loadtest.fake_engine import FakeEngine

CONNECTORS: Final = ("nixl", "nixl_push", "mooncake", "store")
GIVES_UP_S: Final = 480.0
"""VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT and `decoder_kv_blocks_ttl`."""
_RANDOM_END: Final = re.compile(r"-[0-9a-f]{8}$")


class EngineDies(Exception):
    """The request kills the engine core that gets it."""


@dataclass(frozen=True, slots=True)
class Offer:
    """KV that a prefill engine keeps for whoever names the key."""

    fake: FakeEngine
    engine_id: str
    request_id: str
    block_ids: tuple[int, ...]

    @property
    def stands(self) -> bool:
        """Whether the engine lives and still holds it."""
        engine = self.fake.engine
        return not engine.is_crashed and engine.id == self.engine_id and engine.holds(self.request_id)

    def remote(self) -> RemoteKv:
        """Where it is read."""
        settings = self.fake.settings
        return RemoteKv(
            block_ids=self.block_ids,
            engine_id=self.engine_id,
            request_id=self.request_id,
            host=settings.side_channel_host,
            port=settings.side_channel_port,
            is_waited_for=True,
        )


class Meetings:
    """Where the engines of a cluster find one another's KV, and the folder of those that share one."""

    def __init__(self) -> None:
        self._offers: dict[str, Offer] = {}
        self._changed = asyncio.Event()
        self.folder: dict[int, BlockContent] = {}

    def offer(self, key: str, offer: Offer) -> None:
        """A prefill is done."""
        self._offers[key] = offer
        self._changed.set()
        self._changed = asyncio.Event()

    async def find(self, key: str) -> Offer:
        """The offer with that key, once there is one that stands; its reader has it for himself."""
        while True:
            found = self._offers.get(key)
            if found is not None and found.stands:
                return self._offers.pop(key)
            await self._changed.wait()


@dataclass(frozen=True, slots=True)
class FakeConnector:
    """One engine's connector."""

    fake: FakeEngine

    @property
    def name(self) -> str | None:
        """None: the engine was started without one."""
        settings = self.fake.settings
        return settings.connector if settings.has_connector else None

    def check(self, params: Mapping[str, Any]) -> None:
        """Raises EngineDies for parameters that kill the scheduler."""
        role = self.fake.settings.engine.role
        sends, takes = bool(params.get("do_remote_decode")), bool(params.get("do_remote_prefill"))
        if self.name == "mooncake" and ((takes and role is Role.PREFILL) or (sends and role is Role.DECODE)):
            raise EngineDies("a leg of the other role")
        needed = ("remote_engine_id", "remote_host", "remote_port", "tp_size")
        if self.name == "nixl_push" and takes and any(params.get(name) is None for name in needed):
            raise EngineDies("KeyError in update_state_after_alloc")

    async def remote(self, generation: Generation, request_id: str) -> RemoteKv | None:
        """Where this request's KV is read, when it is there. Raises TimeoutError after a real engine's patience."""
        params = generation.kv_params
        if not params.get("do_remote_prefill") or self.name not in ("nixl_push", "mooncake"):
            return remote_kv(params)
        key = str(params.get("transfer_id"))
        if self.name == "nixl_push":
            key = f"{params['remote_engine_id']}/{_base(request_id)}"
        async with asyncio.timeout(GIVES_UP_S / self.fake.cluster.speed):
            while True:
                offer = await self.fake.cluster.meetings.find(key)
                if self.name == "nixl_push" or offer.engine_id == params.get("remote_engine_id"):
                    return offer.remote()

    def load(self, request: EngineRequest) -> None:
        """Takes the prompt's blocks out of the folder, as far as they lie there."""
        if self.name != "store" or not request.token_ids:
            return
        engine, folder = self.fake.engine, self.fake.cluster.meetings.folder
        size = engine.settings.block_tokens
        keys = list(block_keys(request.token_ids, size, lora=request.lora, salt=request.salt))
        usable = keys[: (request.prompt_tokens - 1) // size]
        count = next((n for n, key in enumerate(usable) if key not in folder), len(usable))
        engine.load_blocks(usable[:count], [folder[key] for key in usable[:count]])

    def finished(self, generation: Generation, end: Finished) -> dict[str, object] | None:
        """What a whole answer says of the KV that is kept, which others may find from now on."""
        if self.name == "store":
            self._save(generation)
            return None
        held = end.held
        if held is None:
            return None
        fake = self.fake
        offer = Offer(fake, fake.engine.id, held.request_id, held.block_ids)
        settings = fake.settings
        params = kv_params(held, fake.engine.id, settings.side_channel_host, settings.side_channel_port)
        if self.name == "mooncake":
            if end.reason is FinishReason.LENGTH:
                fake.cluster.meetings.offer(str(generation.kv_params.get("transfer_id")), offer)
            else:
                fake.engine.reader_done(held.request_id, now=fake.cluster.now())
            return None
        if self.name == "nixl_push":
            fake.cluster.meetings.offer(f"{fake.engine.id}/{_base(held.request_id)}", offer)
            params["transfer_mode"] = "push"
            params.pop("remote_prefill_cached_tokens")
        return params

    def _save(self, generation: Generation) -> None:
        size = self.fake.engine.settings.block_tokens
        for prompt in generation.prompts:
            keys = list(block_keys(prompt, size, lora=generation.lora, salt=generation.salt))
            self.fake.cluster.meetings.folder |= self.fake.engine.cached_blocks(keys)


def _base(request_id: str) -> str:
    """The request id without the random end that each engine gives it. Source: nixl/utils.py get_base_request_id."""
    return _RANDOM_END.sub("", request_id)
