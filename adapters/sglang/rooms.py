"""The bootstrap room: the number under which the two legs of a hand-off find one another, and which picks the rank.

A room in use twice at a time kills schedulers, so rooms are drawn from 63 random bits (numbers that count up, or the
clock, collide between gateways and after restarts). A prefill engine with several data-parallel ranks takes the one of
`room % ranks`, and the decode engine looks for the KV there: choosing the room chooses the rank. A conversation stays
on one rank, where the turns before it are cached; everything else is spread evenly.

Source: sglang 0.5.23, disaggregation/common/conn.py (`follow_bootstrap_room`), managers/data_parallel_controller.py.
"""

from __future__ import annotations

import random
import zlib
from typing import Final

import msgspec

from adapters.base import Payload
from gateway.core.types import Engine

BITS: Final = 63
RANKS: Final = "dp_size"
"""Name of the fact: how many data-parallel ranks an engine has."""


def rank_count(prefill: Engine) -> int:
    """Data-parallel ranks of a prefill engine, >= 1; 1 where it did not say."""
    ranks = prefill.details.get(RANKS)
    return ranks if isinstance(ranks, int) and ranks >= 1 else 1


def draw(rng: random.Random, payload: Payload, ranks: int) -> int:
    """A new room, 0 <= room < 2**63, on the rank of the payload's conversation where it is one."""
    room = rng.getrandbits(BITS)
    rank = conversation_rank(payload, ranks)
    if rank is None:
        return room
    pinned = room - room % ranks + rank
    return pinned if pinned < 2**BITS else pinned - ranks


def conversation_rank(payload: Payload, ranks: int) -> int | None:
    """The rank of a chat, 0 <= rank < ranks, the same in all its turns: made of its messages up to the first of a user.

    None where there is nothing to choose or nothing that stays. Not of the first tokens: those are a system prompt that
    many conversations share, and all of them would crowd on one rank.
    """
    messages = payload.body.get("messages")
    if ranks == 1 or not isinstance(messages, list):
        return None
    first = next((i for i, each in enumerate(messages) if isinstance(each, dict) and each.get("role") == "user"), None)
    if first is None:
        return None
    return zlib.crc32(msgspec.json.encode(messages[: first + 1])) % ranks
