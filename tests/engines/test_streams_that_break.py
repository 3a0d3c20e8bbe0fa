"""A real decode engine is killed with SIGKILL in the middle of its streams: every client gets the undisturbed text."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable

import aiohttp
import pytest

from loadtest.vllm_process import VllmFleet
from tests.engines.conftest import until
from tests.engines.prompts import Prompt, make_prompts, text_of

pytestmark = [pytest.mark.engines, pytest.mark.asyncio(loop_scope="session")]

TRIALS_VARIABLE = "SLUICE_KILL_TRIALS"
TRIALS = int(os.environ.get(TRIALS_VARIABLE, "3"))
"""Kills; twenty of them take some twelve minutes."""
STREAMS = 4
OUTPUT_TOKENS = 300
KILL_AFTER_EVENTS = 25


async def read_stream(
    session: aiohttp.ClientSession, url: str, prompt: Prompt, on_events: Callable[[int, str], Awaitable[None]]
) -> tuple[str, int, set[str]]:
    """The text, the output tokens by the usage, and the ids that the events bear; `on_events` hears of each event."""
    texts, ids, tokens, count = [], set(), 0, 0
    async with session.post(url + prompt.path, json=prompt.body) as response:
        assert response.status == 200
        assert response.headers["x-sluice-continues"] == "yes"
        async for line in response.content:
            if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                continue
            event = json.loads(line[6:])
            assert "error" not in event, event
            ids.add(event["id"])
            texts += [text_of(choice) for choice in event["choices"]]
            tokens = event["usage"]["completion_tokens"] if event.get("usage") else tokens
            count += 1
            await on_events(count, response.headers["x-sluice-decode"])
    return "".join(texts), tokens, ids


def long_streams(seed: int) -> list[Prompt]:
    """Streams of a chat and of a completion each, long enough to be cut in the middle."""
    prompts = [each for length in (60, 700) for each in make_prompts(seed + length, [length]) if each.is_stream]
    more = {"max_tokens": OUTPUT_TOKENS, "ignore_eos": True}
    return [Prompt(each.name, each.path, each.body | more, True) for each in prompts[:STREAMS]]


async def nothing(count: int, engine: str) -> None:
    """No engine is killed."""


async def test_a_decode_engine_killed_in_the_middle_of_its_streams_costs_no_client_a_token(
    gateway: str, fleet: VllmFleet, session: aiohttp.ClientSession
) -> None:
    broken = 0
    by_address = {engine.url.removeprefix("http://"): engine for engine in fleet}
    for trial in range(TRIALS):
        await fleet.start_missing()
        assert await until(lambda: is_up(session, gateway), 60)
        prompts = long_streams(9000 + trial)
        undisturbed = [await read_stream(session, gateway, prompt, nothing) for prompt in prompts]
        assert len({text for text, _, _ in undisturbed}) == len(prompts)
        victims: set[str] = set()
        served: list[str] = []

        async def kill_one(count: int, engine: str, victims: set[str] = victims, served: list[str] = served) -> None:
            served += [engine] if count == 1 else []
            if count == KILL_AFTER_EVENTS and not victims:
                victims.add(engine)
                await by_address[engine].kill()

        results = await asyncio.gather(*(read_stream(session, gateway, prompt, kill_one) for prompt in prompts))
        assert [result[:2] for result in results] == [each[:2] for each in undisturbed], f"trial {trial}"
        assert all(len(ids) == 1 for _, _, ids in results)
        assert len(victims) == 1
        broken += sum(engine in victims for engine in served)
        print(
            f"KILL vllm | trial {trial + 1} of {TRIALS} | {broken} broken streams so far | the undisturbed text",
            flush=True,
        )
    print(f"{TRIALS} of {TRIALS} kills, {broken} broken streams, each with the undisturbed text")
    assert broken >= TRIALS


async def is_up(session: aiohttp.ClientSession, gateway: str) -> bool:
    """Whether the gateway takes every engine for a candidate."""
    async with session.get(f"{gateway}/ready") as response:
        return all(engine["health"] == "up" for engine in (await response.json())["engines"])
