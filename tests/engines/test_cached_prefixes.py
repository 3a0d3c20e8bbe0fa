"""What the gateway believes to be cached on real engines, against what they report themselves."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest

from loadtest.vllm_process import MODEL, VllmEngine, VllmFleet
from tests.engines.conftest import serving_gateway, until
from tests.engines.prompts import CHAT, words

pytestmark = [pytest.mark.engines, pytest.mark.asyncio(loop_scope="session")]

CONVERSATIONS = 40
REQUESTS = 300
AT_ONCE = 4
SYSTEM_TOKENS = 400
EXACT_RATIO = 0.99
SAID_WITHIN_S = 5.0


@dataclass
class Conversation:
    """A chat that grows by what was answered and by what is asked next."""

    rng: random.Random
    messages: list[dict[str, str]] = field(default_factory=list)

    async def next_turn(self, session: aiohttp.ClientSession, url: str) -> tuple[int, int]:
        """Asks the next question: cached prompt tokens by the engine's count and by the gateway's."""
        self.messages.append({"role": "user", "content": words(self.rng, self.rng.randint(20, 250))})
        body = {"model": MODEL, "messages": self.messages, "max_tokens": 12, "temperature": 0}
        async with session.post(url + CHAT, json=body) as response:
            answer = await response.json()
            assert response.status == 200, answer
        self.messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"] or "."})
        told = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return told, int(response.headers["x-sluice-cached-tokens"])


def conversations(seed: int, count: int) -> list[Conversation]:
    """Conversations that share a system prompt of more than three blocks."""
    system = {"role": "system", "content": words(random.Random(seed), SYSTEM_TOKENS)}
    return [Conversation(random.Random(1000 * seed + number), [dict(system)]) for number in range(count)]


async def converse(
    session: aiohttp.ClientSession, url: str, chats: list[Conversation], requests: int
) -> list[tuple[int, int]]:
    """So many requests over these conversations, several under way at once, a conversation's turns in order."""
    slots = asyncio.Semaphore(AT_ONCE)
    turns = [requests // len(chats) + (number < requests % len(chats)) for number in range(len(chats))]

    async def run(chat: Conversation, count: int) -> list[tuple[int, int]]:
        pairs = []
        for _ in range(count):
            async with slots:
                pairs.append(await chat.next_turn(session, url))
        return pairs

    done = await asyncio.gather(*(run(chat, count) for chat, count in zip(chats, turns, strict=True)))
    return [pair for pairs in done for pair in pairs]


async def states(session: aiohttp.ClientSession, url: str) -> dict[str, dict[str, object]]:
    """What `/ready` says of each engine."""
    async with session.get(f"{url}/ready") as response:
        return {engine["id"]: engine for engine in (await response.json())["engines"]}


async def is_known_by(session: aiohttp.ClientSession, url: str, engine: VllmEngine, source: str) -> bool:
    """Whether the gateway says that this is how it knows the engine's prefixes."""
    known = (await states(session, url)).get(f"127.0.0.1:{engine.port}")
    return known is not None and known["prefixes"] == source


def config_of(fleet: VllmFleet, path: Path, more: str = "", **endpoints: str) -> Path:
    """A configuration file for these engines; `endpoints` names where an engine's KV events are taken from."""
    lines = [more]
    for engine in fleet:
        lines += ["[[engines]]", f'url = "{engine.url}"', f'role = "{engine.spec.role}"']
        if engine.spec.name in endpoints:
            lines.append(f'kv_events_endpoint = "{endpoints[engine.spec.name]}"')
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize(
    ("tokenizer", "conversation_count", "request_count"),
    [("own", CONVERSATIONS, REQUESTS), ("engine", 8, 48)],
)
async def test_what_is_believed_to_be_cached_is_what_the_engines_count(
    tokenizer: str,
    conversation_count: int,
    request_count: int,
    fleet: VllmFleet,
    session: aiohttp.ClientSession,
    engine_directory: Path,
    tmp_path: Path,
) -> None:
    own = f"[tokens]\ntokenizer = {json.dumps(str(engine_directory / 'model'))}" if tokenizer == "own" else ""
    config = config_of(fleet, tmp_path / "sluice.toml", own)
    async with serving_gateway(fleet, tmp_path / "gateway.log", config) as url:
        for name in ("p0", "p1"):
            assert await until(lambda name=name: is_known_by(session, url, fleet[name], "events"), 20)
        chats = conversations(seed=len(tokenizer), count=conversation_count)
        pairs = await converse(session, url, chats, request_count)
        agreement = [state["prefix_agreement"] for state in (await states(session, url)).values()]
    wrong = [(told, believed) for told, believed in pairs if told != believed]
    hits = sum(told for told, _ in pairs)
    print(f"{tokenizer}: {len(pairs)} requests, {len(wrong)} differ: {wrong}; {hits} tokens were cached; {agreement}")
    assert len(pairs) == request_count
    assert hits > request_count * SYSTEM_TOKENS / 2
    assert len(wrong) <= (1 - EXACT_RATIO) * request_count


async def test_after_a_restart_nothing_is_believed_and_then_what_is_true(
    fleet: VllmFleet, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """Only p0 prefills here, so that every turn goes to the engine that is restarted."""
    engines = [engine for engine in fleet if engine.spec.name != "p1"]
    async with serving_gateway(fleet, tmp_path / "gateway.log", config_of(engines, tmp_path / "s.toml")) as url:
        assert await until(lambda: is_known_by(session, url, fleet["p0"], "events"), 20)
        (chat,) = conversations(seed=77, count=1)
        assert await chat.next_turn(session, url) == (0, 0)
        told, believed = await chat.next_turn(session, url)
        assert told == believed > 0

        await fleet["p0"].kill()
        assert await until(lambda: is_down(session, url, fleet["p0"]), 20)
        await fleet.start_missing()
        assert await until(lambda: is_known_by(session, url, fleet["p0"], "events"), 30)
        assert await until(lambda: is_up(session, url), 20)
        assert await chat.next_turn(session, url) == (0, 0)
        told, believed = await chat.next_turn(session, url)
        assert told == believed > 0


async def is_down(session: aiohttp.ClientSession, url: str, engine: VllmEngine) -> bool:
    return (await states(session, url))[f"127.0.0.1:{engine.port}"]["health"] == "down"


async def is_up(session: aiohttp.ClientSession, url: str) -> bool:
    return all(state["health"] == "up" for state in (await states(session, url)).values())


@asynccontextmanager
async def cuttable(port: int) -> AsyncIterator[tuple[int, asyncio.Event]]:
    """A port that leads to `port`, until the event is set: then every connection is closed and none is taken."""
    cut = asyncio.Event()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", port)
        tasks = [asyncio.create_task(each) for each in (copy(reader, back), copy(there, writer), cut.wait())]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        writer.close()
        back.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], cut
    finally:
        cut.set()
        server.close()


async def test_events_that_are_cut_are_said_within_five_seconds_and_requests_go_on(
    fleet: VllmFleet, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    async with cuttable(fleet["p0"].kv_events_port) as (port, cut):
        config = config_of(fleet, tmp_path / "s.toml", p0=f"tcp://127.0.0.1:{port}")
        async with serving_gateway(fleet, tmp_path / "gateway.log", config) as url:
            assert await until(lambda: is_known_by(session, url, fleet["p0"], "events"), 20)
            (chat,) = conversations(seed=78, count=1)
            await chat.next_turn(session, url)
            cut.set()
            assert await until(lambda: is_known_by(session, url, fleet["p0"], "observed"), SAID_WITHIN_S)
            for _ in range(3):
                await chat.next_turn(session, url)
    log = (tmp_path / "gateway.log").read_text()
    assert '"its event stream is lost"' in log
