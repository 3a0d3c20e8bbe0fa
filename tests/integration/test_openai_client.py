"""The official `openai` client, unchanged, in front of the gateway."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import openai
import pytest

from gateway.config import AdmissionSettings
from tests.integration.harness import MODEL, Site
from tests.polling import until

MESSAGES = [{"role": "user", "content": "Say something long"}]
SETTINGS = {"model": MODEL, "max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture
async def client(mesh: Site) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{mesh.url}/v1", api_key="secret", max_retries=0) as client:
        yield client


async def streamed_chat(client: openai.AsyncOpenAI) -> str:
    stream = await client.chat.completions.create(messages=MESSAGES, stream=True, **SETTINGS)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])


async def test_chat_gives_the_same_text_streamed_and_whole(client):
    whole = await client.chat.completions.create(messages=MESSAGES, **SETTINGS)
    assert whole.usage.completion_tokens == 12
    assert whole.choices[0].finish_reason == "length"
    assert await streamed_chat(client) == whole.choices[0].message.content != ""


async def test_completions_give_the_same_text_streamed_and_whole(client):
    whole = await client.completions.create(prompt="Once upon", **SETTINGS)
    stream = await client.completions.create(prompt="Once upon", stream=True, **SETTINGS)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == whole.choices[0].text != ""


async def test_the_usage_chunk_of_a_stream_arrives(client):
    options = {"include_usage": True}
    stream = await client.chat.completions.create(messages=MESSAGES, stream=True, stream_options=options, **SETTINGS)
    usages = [chunk.usage async for chunk in stream if chunk.usage]
    assert [usage.completion_tokens for usage in usages] == [12]


async def test_a_raw_response_shows_where_the_request_went(client):
    raw = await client.chat.completions.with_raw_response.create(messages=MESSAGES, **SETTINGS)
    assert raw.headers["x-sluice-prefill"] in ("p0", "p1")
    assert raw.headers["x-sluice-decode"] in ("d0", "d1")
    assert raw.headers["x-sluice-attempts"] == "1"
    assert int(raw.headers["x-sluice-decision-us"]) >= 0
    assert raw.request_id == raw.headers["x-request-id"] != ""
    assert raw.parse().choices[0].message.content


async def test_a_raw_streaming_response_has_the_headers_before_its_body(client):
    calls = client.chat.completions.with_streaming_response
    async with calls.create(messages=MESSAGES, stream=True, **SETTINGS) as response:
        assert response.headers["x-sluice-decode"] in ("d0", "d1")
        assert response.headers["content-type"].startswith("text/event-stream")
        assert [line async for line in response.iter_lines() if line][-1] == "data: [DONE]"


async def test_the_models_are_listed(client):
    assert [model.id async for model in client.models.list()] == [MODEL]


async def test_an_unknown_model_is_a_not_found_error_that_lists_the_models(client):
    with pytest.raises(openai.NotFoundError, match=f"`nope` does not exist.*{MODEL}"):
        await client.chat.completions.create(messages=MESSAGES, model="nope")


async def test_a_wrong_body_is_a_bad_request_error_with_its_parameter(client):
    with pytest.raises(openai.BadRequestError, match="max_tokens") as caught:
        await client.chat.completions.create(messages=MESSAGES, model=MODEL, max_tokens=-3)
    assert caught.value.param == "max_tokens"
    assert caught.value.type == "invalid_request_error"


async def test_what_only_the_engine_refuses_comes_back_in_its_words(client):
    with pytest.raises(openai.BadRequestError, match=r"maximum context length|max_model_len"):
        await client.chat.completions.create(messages=MESSAGES, model=MODEL, max_tokens=10**6)


@pytest.mark.parametrize("fault", ["error_after_tokens", "drop_after_tokens"])
async def test_a_stream_that_breaks_raises_after_the_text_before_it(mesh, client, fault):
    setattr(mesh["d0"].faults, fault, 2)
    setattr(mesh["d1"].faults, fault, 2)
    said: list[str] = []

    async def listen() -> None:
        async for chunk in await client.chat.completions.create(messages=MESSAGES, stream=True, **SETTINGS):
            said.extend([chunk.choices[0].delta.content] if chunk.choices[0].delta.content else [])

    with pytest.raises(openai.APIError):
        await listen()
    assert 1 <= len(said) <= 6  # two of each attempt: what broke goes on elsewhere, as often as attempts are allowed


async def test_the_synchronous_client_works_the_same(mesh, client):
    def work() -> tuple[str, str, list[str]]:
        with openai.OpenAI(base_url=f"{mesh.url}/v1", api_key="secret", max_retries=0) as blocking:
            whole = blocking.chat.completions.create(messages=MESSAGES, **SETTINGS)
            stream = blocking.chat.completions.create(messages=MESSAGES, stream=True, **SETTINGS)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            with pytest.raises(openai.NotFoundError):
                blocking.completions.create(model="nope", prompt="x")
            return whole.choices[0].message.content, text, [model.id for model in blocking.models.list()]

    whole, streamed, models = await asyncio.to_thread(work)
    assert whole == streamed == await streamed_chat(client)
    assert models == [MODEL]


async def test_a_client_that_closes_its_stream_half_way_leaves_every_engine_idle(mesh, client):
    stream = await client.chat.completions.create(messages=MESSAGES, stream=True, **SETTINGS | {"max_tokens": 20_000})
    async for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    await stream.close()
    await mesh.assert_clean()


async def test_the_refusal_is_a_rate_limit_error_that_says_when_to_come_back(start):
    limits = AdmissionSettings(max_waiting=0, max_in_flight_per_engine=1)
    site = await start("b", admission=limits)
    site["b0"].freeze()
    busy = asyncio.create_task(site.ask())
    async with openai.AsyncOpenAI(base_url=f"{site.url}/v1", api_key="k", max_retries=0) as client:
        await until(lambda: bool(site.state.reservations))
        with pytest.raises(openai.RateLimitError) as caught:
            await client.chat.completions.create(messages=MESSAGES, **SETTINGS)
    assert int(caught.value.response.headers["retry-after"]) >= 1
    site["b0"].thaw()
    assert (await busy).error is None
