"""The order of one engine's cache events: nothing missed, nothing twice, and a restart noticed.

One `KvEventStream` follows one data-parallel rank of one engine. The shell (gateway/kv_events.py) gives it what arrives
and does what it asks, which is one thing only: "replay from this sequence number". What the messages mean for the index
is collected with `take`, after one message or after many.

    happening                                     answer
    first contact, or connected again             replay, from 0 or from the last message seen
    the next number                               taken in
    a number ahead: messages were missed          replay from the last message seen; this one will be in it too
    a number behind, same bytes as before         dropped: a duplicate, or live and replayed both
    a number behind, other bytes                  the engine restarted: clear, replay from 0
    replay: the last message seen differs         the engine restarted: clear, replay from 0
    replay: begins or goes on too late            messages are lost for good: clear, go on from there
    no replay to be had                           the same
    bytes that make no sense                      MalformedEngineData, and as if the message had not come

A replay always starts with the last message seen, though it is known: only its bytes tell whether the engine that
answers is still the one we followed. Numbers alone do not: an engine that restarted while we were away may have counted
past ours by the time we are back.

Why clear when messages are lost? Among them may be removals: going on would leave blocks in the index that the engine
dropped long ago. Less is better than wrong, and what is stored from then on is right again.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

from adapters.kv_events import REPLAY_END, AllBlocksCleared, CacheEvent, decode_batch, decode_frames
from adapters.kv_translate import BlockEvent, HashTranslator

_REMEMBERED_MESSAGES = 1024
"""Messages whose digest is kept, to tell a duplicate from a restarted engine that counts anew."""
_REPLAY_END_NUMBER = int.from_bytes(REPLAY_END, "big")


class KvEventStream:
    """Follows the messages of one cache and turns them into events for the index."""

    def __init__(self, holder_id: str, *, max_blocks: int, can_replay: bool) -> None:
        """`holder_id` is the engine id in the events; `max_blocks` bounds the blocks followed per tier."""
        self.translator = HashTranslator(holder_id, max_blocks=max_blocks)
        self.can_replay = can_replay
        self.restart_count = 0
        """How often the engine was seen to have restarted."""
        self.lost_count = 0
        """How often messages were lost for good."""
        self._last_number: int | None = None
        self._digests: dict[int, bytes] = {}
        self._pending: list[CacheEvent] = []
        self._last_live = -1
        self._is_replaying = False
        self._is_verified = False
        self._is_skipping = False
        self._takes_any = False

    def connected(self) -> int | None:
        """The connection stands, for the first time or again: the number to replay from, or None."""
        if self._last_number is not None and not self.can_replay:
            self._lose()
        return self._ask_replay()

    def live(self, frames: Sequence[bytes]) -> int | None:
        """Takes in a published message: the number to replay from, or None. Raises MalformedEngineData."""
        number, payload = decode_frames(frames)
        events = decode_batch(payload)
        if self._is_duplicate(number, payload):
            return None
        if number <= (-1 if self._last_number is None else self._last_number):
            self._restart()
        self._last_live = number
        is_next = number == (0 if self._last_number is None else self._last_number + 1)
        if not is_next and self.can_replay and not self._takes_any:
            return self._ask_replay()
        if not is_next and self._last_number is not None:
            self._lose()
        self._take_in(number, payload, events)
        return None

    def replayed(self, frames: Sequence[bytes]) -> int | None:
        """Takes in a message of a replay, its end included: the number to replay from anew, or None.

        Raises MalformedEngineData.
        """
        number, payload = decode_frames(frames)
        if number == _REPLAY_END_NUMBER:
            return self._end_replay()
        last = self._last_number
        if self._is_skipping or (last is not None and number < last):
            return None
        if number == last:
            self._verify(payload)
            return None
        events = decode_batch(payload)
        if last is not None and (number > last + 1 or not self._is_verified):
            self._lose()
        self._take_in(number, payload, events)
        self._is_verified = True
        return None

    def replay_failed(self) -> None:
        """The replay did not come, or broke off: what was missed is lost."""
        self._is_replaying = self._is_skipping = False
        self._lose()
        self._takes_any = True

    @property
    def is_replaying(self) -> bool:
        """Whether a replay was asked for and has not ended."""
        return self._is_replaying

    def take(self) -> list[BlockEvent]:
        """What the messages since the last call change in the index."""
        pending, self._pending = self._pending, []
        return self.translator.fold(pending)

    def _ask_replay(self) -> int | None:
        if not self.can_replay:
            return None
        self._is_replaying, self._is_verified, self._is_skipping = True, self._last_number is None, False
        return self._last_number or 0

    def _end_replay(self) -> int | None:
        """The replay is over. One that did not even show the last message seen came from another life."""
        was_skipping, self._is_replaying, self._is_skipping = self._is_skipping, False, False
        if not was_skipping and not self._is_verified:
            self._restart()
            was_skipping = True
        return self._ask_replay() if was_skipping else None

    def _verify(self, payload: bytes) -> None:
        """Compares the replayed last message with the one seen."""
        if self._digests.get(self._last_number or 0) == _digest(payload):
            self._is_verified = True
        else:
            self._restart()
            self._is_skipping = True

    def _is_duplicate(self, number: int, payload: bytes) -> bool:
        """Whether a live message is known: it came before, or a replay that overtook it brought it."""
        if self._last_number is None or number > self._last_number:
            return False
        digest = self._digests.get(number)
        return number > self._last_live if digest is None else digest == _digest(payload)

    def _take_in(self, number: int, payload: bytes, events: list[CacheEvent]) -> None:
        self._last_number = number
        self._takes_any = False
        self._digests[number] = _digest(payload)
        if len(self._digests) > _REMEMBERED_MESSAGES:
            del self._digests[next(iter(self._digests))]
        self._pending += events

    def _restart(self) -> None:
        self.restart_count += 1
        self._forget()

    def _lose(self) -> None:
        self.lost_count += 1
        self._forget()

    def _forget(self) -> None:
        self._last_number = None
        self._last_live = -1
        self._digests.clear()
        self._pending = [AllBlocksCleared()]


def _digest(payload: bytes) -> bytes:
    return blake2b(payload, digest_size=8).digest()
