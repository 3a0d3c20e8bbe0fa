"""The two-leg exchange of vLLM's NIXL connector: prefill one token, take the transfer parameters, decode with them.

The prefill engine answers with an opaque object that names its KV blocks; the decode engine reads them with it. They
can be read once: the first reader's notification frees the blocks, and a lease of 30 s frees them anyway, after which a
late read may fetch recycled memory without an error. So the parameters never outlive this attempt. Whatever goes wrong
after the prefill ends in Retry, and the next attempt prefills anew (cheap on the same engine: its prefix cache helps).

    open leg   what happened                       commands
    prefill    200 with sound parameters           Prefilled, Call decode with them
    prefill    200 without parameters              Prefilled, Call decode plainly (it prefills), or Retry if it cannot
    prefill    200 with unsound ones, or garbage   Retry: a decode engine could die of them
    prefill    4xx that any engine would give      Answer
    prefill    other status, stream, broken        Retry
    decode     event that only names the role      nothing yet
    decode     event with output                   Commit
    decode     event with an error                 Hangup, then as for its status
    decode     whole answer, or broken             Answer, or Retry as above

A request queued in the gateway between the legs would let the lease run down, for only a decode engine that has the
request renews it: the decode call follows at once, and its engine must show a head within `lease_s`.

Source: vllm 0.32.0, distributed/kv_transfer/kv_connector/v1/nixl/{base,pull}_scheduler.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from adapters.answers import Usage, usage
from adapters.base import (
    Answer,
    Answered,
    Broken,
    Call,
    Command,
    Commit,
    Happening,
    HeadEvent,
    Leg,
    Payload,
    Prefilled,
    Retry,
)
from adapters.vllm import bodies, verdict
from gateway.core.errors import MalformedEngineData
from gateway.core.types import Engine

ASK_FOR_BLOCKS: Final = {"do_remote_decode": True, "do_remote_prefill": False}

# The prefill's one token is thrown away, so nothing that only shapes the output or the answer is of use there:
# `stream_options` and `min_tokens` would be refused beside the new limits, the others cost time and bytes. Stop
# conditions stay: parameters come with a finish by stop too, and a faulty one is refused before the prompt is computed.
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
PREFILL_SETS: Final = {
    "stream": False,
    "n": 1,
    "max_tokens": 1,
    "max_completion_tokens": 1,
    "kv_transfer_params": ASK_FOR_BLOCKS,
}

_Name = Annotated[str, Meta(min_length=1)]
_BlockId = Annotated[int, Meta(ge=0)]


class _PrefillAnswer(Struct):
    kv_transfer_params: msgspec.Raw = msgspec.Raw(b"null")


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


@dataclass(frozen=True, slots=True)
class Transfer:
    """What a prefill answer says about reading its blocks."""

    params: msgspec.Raw
    """The transfer parameters, byte for byte as they came."""
    cached_tokens: int | None


def transfer_of(body: bytes) -> Transfer | None:
    """The transfer that a prefill answer offers; None when it offers none.

    Raises MalformedEngineData when the answer is not JSON or its parameters could harm a decode engine.
    """
    try:
        params = msgspec.json.decode(body, type=_PrefillAnswer).kv_transfer_params
        if bytes(params) in (b"null", b"{}"):
            return None
        transfer = msgspec.json.decode(params, type=_Transfer)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedEngineData(f"The prefill engine's answer is not sound: {error}.") from None
    has_blocks = any(group != [] for group in transfer.remote_block_ids)
    if not transfer.do_remote_prefill or transfer.do_remote_decode or not has_blocks:
        raise MalformedEngineData("The prefill engine's transfer parameters name nothing to read.")
    return Transfer(params, transfer.remote_prefill_cached_tokens)


@dataclass(slots=True)
class NixlPull:
    """One attempt on one pair. Ends in Commit, Answer or Retry, once; what happens later is ignored."""

    payload: Payload
    prefill: Engine
    decode: Engine
    lease_s: float
    _open: Leg | None = field(default=Leg.PREFILL, init=False)

    def start(self) -> list[Command]:
        """The prefill call."""
        kept = {name: value for name, value in self.payload.body.items() if name not in PREFILL_DROPS}
        return [self._call(Leg.PREFILL, self.prefill, bodies.encode(self.payload, kept | PREFILL_SETS))]

    def receive(self, happening: Happening) -> list[Command]:
        """What to do now. Nothing for a leg that is not open."""
        if happening.leg is not self._open:
            return []
        commands = self._next(happening)
        if any(isinstance(command, Commit | Retry | Answer) for command in commands):
            self._open = None
        return commands

    def _next(self, happening: Happening) -> list[Command]:
        match happening:
            case Answered(leg=Leg.PREFILL):
                return self._prefill_answered(happening)
            case HeadEvent(leg=Leg.PREFILL):
                return verdict.garbage(self.prefill, Leg.PREFILL)
            case Broken(leg=Leg.PREFILL):
                return verdict.broken(self.prefill, happening)
            case _:
                return verdict.of_answer(self.decode, happening)

    def _prefill_answered(self, answer: Answered) -> list[Command]:
        if answer.status != 200:
            return verdict.refused(self.prefill, answer)
        try:
            transfer = transfer_of(answer.body)
        except MalformedEngineData:
            return [Retry(self.prefill.id, "prefill_bad_parameters")]
        if transfer is None and not self.decode.can_serve_alone:
            return [Retry(self.prefill.id, "prefill_no_parameters")]
        self._open = Leg.DECODE
        told = usage(answer.body) or Usage()
        # Only some engines are started to tell cached tokens in `usage`; the transfer parameters always do.
        cached_tokens = transfer.cached_tokens if transfer else told.cached_tokens
        return [Prefilled(told.prompt_tokens, cached_tokens), self._decode_call(transfer.params if transfer else None)]

    def _decode_call(self, params: msgspec.Raw | None) -> Call:
        if params is None:
            return self._call(Leg.DECODE, self.decode, bodies.encode(self.payload, self.payload.body), is_answer=True)
        # A stream's head comes when the engine has the request; a whole answer's head only when all is generated.
        head_within_s = self.lease_s if self.payload.is_stream else None
        body = bodies.encode(self.payload, self.payload.body, params)
        return self._call(
            Leg.DECODE, self.decode, body, is_answer=True, is_replayable=False, head_within_s=head_within_s
        )

    def _call(
        self,
        leg: Leg,
        engine: Engine,
        body: bytes,
        *,
        is_answer: bool = False,
        is_replayable: bool = True,
        head_within_s: float | None = None,
    ) -> Call:
        headers = verdict.leg_headers(self.payload)
        return Call(leg, engine, self.payload.path, body, headers, is_answer, is_replayable, head_within_s)
