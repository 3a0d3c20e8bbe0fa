"""What the gateways of a simulation tell each other: the outbox, the messages and the follower of the live gateway.

The messages are encoded and read as they are on their way through a store; only the way itself is a delay here. The
block events of engines come to every gateway at once, as where each of them listens itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from gateway.core.events import Event, Joined, PrefillDone
from gateway.core.types import Dispatch, Request
from gateway.stores.codec import encode
from gateway.stores.follower import Follower
from gateway.stores.outbox import Outbox
from loadtest.agenda import Agenda
from loadtest.sim_gateway import GatewayShell

LEASE_S = 5.0
"""The live gateway's default, gateway/config.py: StoreSettings."""
TURN_S = 0.02
"""The same."""
RENEWALS_PER_LEASE = 4


class SimView:
    """The way between gateways: so long after one did something the others know."""

    def __init__(self, gateways: Sequence[GatewayShell], agenda: Agenda, *, delay_s: float) -> None:
        self._gateways = gateways
        self._agenda = agenda
        self._delay_s = delay_s
        names = [f"g{number}" for number in range(len(gateways))]
        self._outboxes = [
            Outbox(name, gateway.scheduler, shard_count=1, lease_s=LEASE_S, max_events=1_000_000)
            for name, gateway in zip(names, gateways, strict=True)
        ]
        self._followers = [Follower(name, follows_blocks=lambda engine_id: False) for name in names]
        self._is_due = [False] * len(gateways)
        for name, gateway in zip(names, gateways, strict=True):
            gateway.apply(Joined(name, TURN_S), now=0.0)
        for outbox in self._outboxes:
            outbox.renew(now=0.0)
        for number in range(len(gateways)):  # they know of one another before the first request comes
            self._tell(number, 0.0, delay_s=0.0)
        agenda.note(LEASE_S / RENEWALS_PER_LEASE, self._renew)

    def sent(self, gateway: int, request: Request, dispatch: Dispatch, now: float) -> None:
        """That gateway dispatched the request."""
        self._outboxes[gateway].sent(request, dispatch.estimate, now=now)
        self._expect(gateway, now)

    def handed_off(self, gateway: int, request: Request, dispatch: Dispatch, now: float) -> None:
        """That gateway has the request decoded elsewhere than where it was sent: it is given up there and sent anew."""
        outbox = self._outboxes[gateway]
        outbox.ended(request.id, is_finished=False, now=now)
        outbox.sent(request, dispatch.estimate, now=now)
        outbox.told(PrefillDone(request.id), now=now)
        self._expect(gateway, now)

    def told(self, gateway: int, event: Event, now: float) -> None:
        """Something happened to a request of that gateway."""
        self._outboxes[gateway].told(event, now=now)
        self._expect(gateway, now)

    def ended(self, gateway: int, request_id: str, now: float) -> None:
        """That gateway refused a request, perhaps one that it had dispatched."""
        self._outboxes[gateway].ended(request_id, is_finished=False, now=now)
        self._expect(gateway, now)

    def _renew(self, now: float) -> None:
        for number, outbox in enumerate(self._outboxes):
            outbox.renew(now=now)
            self._expect(number, now)
        self._agenda.note(now + LEASE_S / RENEWALS_PER_LEASE, self._renew)

    def _expect(self, gateway: int, now: float) -> None:
        """What happens at one instant is told at once."""
        if not self._is_due[gateway] and len(self._outboxes[gateway]):
            self._is_due[gateway] = True
            self._agenda.note(now, partial(self._tell, gateway))

    def _tell(self, gateway: int, now: float, *, delay_s: float | None = None) -> None:
        self._is_due[gateway] = False
        delay_s = self._delay_s if delay_s is None else delay_s
        for letter in self._outboxes[gateway].take(now=now):
            data = encode(letter.message)
            for other in range(len(self._gateways)):
                if other != gateway:
                    self._agenda.note(now + delay_s, partial(self._hear, other, data))

    def _hear(self, gateway: int, data: bytes, now: float) -> None:
        for event in self._followers[gateway].take(0, data):
            self._gateways[gateway].apply(event, now=now)
