"""Locust users that chat: each keeps a conversation, streams every answer, thinks, and asks on.

    locust -f loadtest/locustfile.py --host http://127.0.0.1:8000 --model MODEL --slo-ttft-ms 2000 --users 50

A closed loop, as people are: while an answer is slow, its user does not ask. For load that does not wait, replay a
trace (`loadtest/locustfile_trace.py`). TTFT, TBT and tokens per second are rows of Locust's tables, in its web page
too; goodput stands in the summary at the end, and under `/goodput` meanwhile.
"""

from __future__ import annotations

import random

import msgspec
from locust import User, between, task

from loadtest.client import ClientRequest
from loadtest.locusts.options import options_of
from loadtest.locusts.session import Session
from loadtest.locusts.stream import Connection, clock
from loadtest.prompts import WORDS

SYSTEM_WORDS = 400
"""Every conversation begins with the same instructions, as in a product: their KV is worth keeping."""
MAX_TURNS = 6

session = Session()


class ChatUser(User):
    """One person with one conversation at a time."""

    wait_time = between(1, 5)

    def on_start(self) -> None:
        options = options_of(self.environment)
        assert self.host, "say where the gateway is: --host http://HOST:PORT"
        self._connection = Connection(self.host, timeout_s=options.timeout_s, keep_text=True)
        self._rng = random.Random()
        self._messages: list[dict[str, str]] = []

    def on_stop(self) -> None:
        self._connection.close()

    @task
    def ask(self) -> None:
        """The next turn, or the first of a new conversation."""
        if not self._messages or len(self._messages) > 2 * MAX_TURNS:
            self._messages = [{"role": "system", "content": words(random.Random(0), SYSTEM_WORDS)}]
        self._messages.append({"role": "user", "content": words(self._rng, self._rng.randint(10, 200))})
        result = self._connection.send(self._request(), scheduled_at=clock())
        session.goodput.add(result, "chat")
        if result.error is None:
            self._messages.append({"role": "assistant", "content": result.text})
        else:
            self._messages = []

    def _request(self) -> ClientRequest:
        options = options_of(self.environment)
        body = {
            "model": options.model,
            "messages": self._messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": self._rng.randint(16, 256),
        }
        return ClientRequest(0.0, msgspec.json.encode(body), headers=tuple(tuple(pair) for pair in options.header))


def words(rng: random.Random, count: int) -> str:
    """So many words of the vocabulary of synthetic prompts."""
    return " ".join(rng.choices(WORDS, k=count))
