"""A decode engine that dies after the first token: another one says the rest, and the client cannot tell."""

from __future__ import annotations

import asyncio
import json

import pytest

from gateway.config import AdmissionSettings, ContinuationSettings, EngineClientSettings
from loadtest import tokenizer
from tests.integration.harness import CHAT, COMPLETIONS, MODEL, Site, Start, chat_body, events, words
from tests.integration.scripted_engine import CHUNKED, DONE, Received, chunk, serving, whole
from tests.polling import until

PROMPT = words(200)
ways = pytest.mark.parametrize("path", [CHAT, COMPLETIONS], ids=["chat", "completions"])
BY_TEXT = ContinuationSettings(asks_for_ids=False)


def body_of(path: str, **extra):
    if path == CHAT:
        return chat_body(PROMPT, stream=True, max_tokens=30, **extra)
    fields = {"model": MODEL, "prompt": PROMPT, "temperature": 0, "ignore_eos": True, "max_tokens": 30}
    return fields | {"stream": True} | extra


def break_decodes(site: Site, fault: str = "drop_after_tokens", tokens: int = 12) -> None:
    """Every decode engine breaks its streams after so many tokens: the rest comes in pieces from one and another."""
    for name, fake in site.fakes.items():
        if name.startswith("d"):
            setattr(fake.faults, fault, tokens)


def plain(stream: str):
    """The events without what differs from answer to answer."""
    found = [json.loads(data) if data != "[DONE]" else data for data in events(stream)]
    for event in found:
        if isinstance(event, dict):
            event.pop("id", None), event.pop("created", None)
    return found


def text_of(stream: str) -> str:
    choices = [choice for event in plain(stream) if isinstance(event, dict) for choice in event.get("choices", [])]
    return "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)


@ways
@pytest.mark.parametrize("fault", ["drop_after_tokens", "error_after_tokens"])
@pytest.mark.parametrize("settings", [ContinuationSettings(), BY_TEXT], ids=["ids", "text"])
async def test_the_client_gets_the_events_of_an_undisturbed_stream(start, path, fault, settings):
    site = await start("ppdd", continuation=settings)
    body = body_of(path, stream_options={"include_usage": True})
    _, undisturbed, _ = await site.post(path, body)
    break_decodes(site, fault)
    status, stream, response = await site.post(path, body)
    assert (status, response.headers["x-sluice-continues"]) == (200, "yes")
    assert plain(stream) == plain(undisturbed)
    names = {(event["id"], event["created"]) for event in map(json.loads, events(stream)[:-1])}
    assert len(names) == 1
    assert site.gateway.dispatcher.kept_bytes == 0


async def test_an_engine_that_is_killed_with_many_streams_costs_none_of_them_a_token(mesh):
    expected = [(await mesh.ask(words(50, seed), max_tokens=60)).text for seed in range(6)]
    mesh["d0"].slow_down(100)
    streams = [asyncio.create_task(mesh.ask(words(50, seed), max_tokens=60)) for seed in range(6)]
    await until(lambda: mesh["d0"].engine.counters.generated_tokens >= 6)
    await mesh["d0"].die()
    results = await asyncio.gather(*streams)
    assert [(result.error, result.text) for result in results] == [(None, text) for text in expected]


async def test_an_engine_that_freezes_half_way_is_left_for_another(start):
    site = await start("pdd", engine_client=EngineClientSettings(idle_timeout_s=0.3))
    expected = (await site.ask(PROMPT, max_tokens=200)).text
    for name in ("d0", "d1"):
        site[name].slow_down(30)
    asking = asyncio.create_task(site.ask(PROMPT, max_tokens=200))
    await until(lambda: site.busy("d0", "d1") == 1 and site.gateway.dispatcher.kept_bytes > 0)
    victim = "d0" if site.busy("d0") else "d1"
    site[victim].freeze()
    site["d0" if victim == "d1" else "d1"].slow_down(1)
    result = await asking
    assert (result.error, result.text) == (None, expected)


async def test_a_text_that_ends_by_itself_ends_where_it_would_have(mesh):
    body = chat_body(PROMPT, stream=True, max_tokens=2000, ignore_eos=False)
    _, undisturbed, _ = await mesh.post(CHAT, body)
    break_decodes(mesh, tokens=100)
    _, stream, _ = await mesh.post(CHAT, body)
    assert plain(stream) == plain(undisturbed)


async def test_a_client_that_wants_token_ids_gets_each_of_them_once(mesh):
    body = body_of(CHAT, return_token_ids=True)
    _, undisturbed, _ = await mesh.post(CHAT, body)
    break_decodes(mesh)
    _, stream, _ = await mesh.post(CHAT, body)
    assert plain(stream) == plain(undisturbed)


async def test_token_ids_that_nobody_asked_for_are_not_seen(mesh):
    _, stream, _ = await mesh.post(CHAT, body_of(CHAT))
    assert {choice.get("token_ids") for event in plain(stream)[:-1] for choice in event["choices"]} == {None}
    assert plain(stream)[0]["prompt_token_ids"] is None


@pytest.mark.parametrize(
    "extra",
    [{"seed": 7}, {"stop": ["zzz"]}, {"presence_penalty": 0.5}, {"n": 2, "temperature": 1}],
    ids=lambda extra: next(iter(extra)),
)
async def test_what_cannot_be_continued_says_so_and_ends_in_one_error_event(mesh, extra):
    break_decodes(mesh)
    status, stream, response = await mesh.post(CHAT, body_of(CHAT, **extra))
    assert (status, response.headers["x-sluice-continues"]) == (200, "no")
    assert [('"error"' in data) for data in events(stream)].count(True) == 1
    assert "[DONE]" not in events(stream)


async def test_attempts_are_bounded_over_beginning_and_going_on(start):
    site = await start("ppdd", admission=AdmissionSettings(max_attempts=2))
    _, undisturbed, _ = await site.post(CHAT, body_of(CHAT))
    break_decodes(site)
    _, stream, _ = await site.post(CHAT, body_of(CHAT))
    said = text_of(stream)
    assert said
    assert text_of(undisturbed).startswith(said)
    assert '"error"' in events(stream)[-1]


async def test_a_stream_that_is_over_its_bound_is_not_continued(start):
    site = await start("ppdd", continuation=ContinuationSettings(max_stream_bytes=1024))
    break_decodes(site)
    _, stream, _ = await site.post(CHAT, body_of(CHAT))
    assert '"error"' in events(stream)[-1]
    assert site.gateway.dispatcher.kept_bytes == 0


async def test_streams_share_what_may_be_kept_of_all_of_them(start):
    site = await start("ppdd", continuation=ContinuationSettings(max_bytes=10_000))
    for name in ("d0", "d1"):
        site[name].slow_down(20)
    streams = [asyncio.create_task(site.ask(words(50, seed), max_tokens=30)) for seed in range(8)]
    kept = 0
    while not all(stream.done() for stream in streams):
        kept = max(kept, site.gateway.dispatcher.kept_bytes)
        await asyncio.sleep(0.005)
    assert 0 < kept <= 10_000
    assert all(stream.result().error is None for stream in streams)


async def test_continuation_can_be_turned_off(start: Start):
    site = await start("ppdd", continuation=ContinuationSettings(is_on=False))
    break_decodes(site)
    _, stream, response = await site.post(CHAT, body_of(CHAT))
    assert response.headers["x-sluice-continues"] == "no"
    assert '"error"' in events(stream)[-1]


@ways
async def test_a_long_prompt_is_continued_with_what_was_said_and_not_with_its_old_bytes(start, path):
    """Long fields are encoded once for all legs of an attempt: the rest has other fields."""
    site = await start("ppdd", continuation=BY_TEXT)
    body = body_of(path)
    long = words(3000, seed=5)
    body |= {"prompt": long} if path == COMPLETIONS else {"messages": [{"role": "user", "content": long}]}
    _, undisturbed, _ = await site.post(path, body)
    break_decodes(site)
    _, stream, _ = await site.post(path, body)
    assert plain(stream) == plain(undisturbed)


def piece(text: str, ids: list[int], prompt_ids: list[int] | None = None, finish: str | None = None) -> bytes:
    """One event of a completion as one HTTP chunk."""
    choice = {"index": 0, "text": text, "token_ids": ids, "prompt_token_ids": prompt_ids, "finish_reason": finish}
    named = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": MODEL, "choices": [choice]}
    return chunk(b"data: " + json.dumps(named).encode() + b"\n\n")


@pytest.mark.parametrize("tells", [True, False], ids=["engine_tells", "engine_does_not_tell"])
async def test_the_rest_is_asked_for_after_a_whole_character(start, tells):
    """An engine whose prompt ends in half a character says the whole prompt again (real vLLM does)."""
    asked: list[object] = []

    async def play(received: Received, writer: asyncio.StreamWriter) -> None:
        if received.path == "/detokenize":
            text = tokenizer.decode(received.body["tokens"])
            writer.write(whole(json.dumps({"prompt": text}).encode()) if tells else whole(b"{}", status=404))
            return
        asked.append(received.body["prompt"])
        if len(asked) == 1:
            writer.write(CHUNKED + piece("a", [97], [104, 105]) + piece("b", [98, 0xC3]))
            await writer.drain()
            writer.close()
            return
        rest = [piece("", [0xC3]), piece("é", [0xA9], finish="length")]
        writer.write(CHUNKED + b"".join(rest) + chunk(DONE) + b"0\r\n\r\n")

    async with serving(play) as one, serving(play) as other:
        site = await start("", engines=[one.settings("e0"), other.settings("e1")])
        await one.is_up(site)
        body = {"model": MODEL, "prompt": "hi", "temperature": 0, "max_tokens": 4, "stream": True}
        _, stream, _ = await site.post(COMPLETIONS, body)
    assert text_of(stream) == "abé"
    assert asked[1] == ([104, 105, 97, 98] if tells else "hiab")
