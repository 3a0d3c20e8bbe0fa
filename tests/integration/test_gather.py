"""Token ids from engines and from a tokenizer of our own: used where certain, refused where they differ."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.config import TokenSettings
from loadtest import tokenizer
from tests.integration.harness import CHAT, Site, chat_body, until, words

ASKING = TokenSettings(ask_engine=True)
COMPLETIONS = "/v1/completions"
A_TOKENIZER = next((Path(__file__).parents[1] / "recorded").rglob("tokenizer.json"))


async def prompt_tokens(site: Site, path: str = CHAT, **body: object) -> int:
    """The engine's count for a request that was answered."""
    fields = chat_body(words(40)) if path == CHAT else {"model": "emulated", "prompt": words(40), "max_tokens": 4}
    status, answer, _ = await site.post(path, fields | body)
    assert status == 200, answer
    return answer["usage"]["prompt_tokens"]


@pytest.fixture
def watch_decisions():
    """Keeps what the scheduler is asked, beside asking it."""

    def watch(site: Site) -> list[tuple[int, bool, int]]:
        seen: list[tuple[int, bool, int]] = []
        scheduler = site.gateway.driver.scheduler
        decide = scheduler.decide

        def spy(request, *, now):
            blocks = sum(len(hashes) for hashes in request.block_hashes.values())
            seen.append((request.prompt_tokens, request.is_prompt_exact, blocks))
            return decide(request, now=now)

        scheduler.decide = spy
        return seen

    return watch


async def test_an_engine_tells_the_exact_length_and_the_blocks(start, watch_decisions):
    site = await start("pd", engine={"block_tokens": 16}, tokens=ASKING)
    await until(lambda: site.gateway.driver.scheduler.block_sizes == (16,))
    seen = watch_decisions(site)
    told = await prompt_tokens(site)
    assert seen == [(told, True, told // 16)]


async def test_a_completion_by_token_ids_is_counted_without_asking(start, watch_decisions):
    site = await start("pd", engine={"block_tokens": 16}, tokens=ASKING)
    seen = watch_decisions(site)
    ids = tokenizer.encode(words(30))
    await prompt_tokens(site, COMPLETIONS, prompt=ids)
    assert seen[0][:2] == (len(ids), True)


async def test_without_a_source_the_length_is_estimated_and_learnt_from_answers(start, watch_decisions):
    site = await start("pd")
    seen = watch_decisions(site)
    for _ in range(60):
        told = await prompt_tokens(site)
    assert not any(is_exact for _, is_exact, _ in seen)
    first, last = abs(seen[0][0] - told), abs(seen[-1][0] - told)
    assert last <= min(first, 0.1 * told)


async def test_a_tokenizer_of_another_model_is_found_out_and_changes_no_answer(start, watch_decisions):
    plain = await start("pd")
    site = await start("pd", tokens=TokenSettings(tokenizer=str(A_TOKENIZER)))
    seen = watch_decisions(site)
    _, expected, _ = await plain.post(CHAT, chat_body(words(40)))
    for _ in range(3):
        _, answer, _ = await site.post(CHAT, chat_body(words(40)))
        assert answer["choices"][0]["message"] == expected["choices"][0]["message"]
        assert answer["usage"] == expected["usage"]
    assert [blocks for _, _, blocks in seen] == [0, 0, 0]


async def test_an_engine_that_does_not_tell_is_not_asked_again_soon(start):
    from tests.integration.scripted_engine import serving

    async with serving() as engine:
        site = await start("", engines=[engine.settings("b0")], is_awaited=False, tokens=ASKING)
        await engine.is_up(site)
        for _ in range(3):
            await site.post(CHAT, chat_body())
        assert [each.path for each in engine.received].count("/tokenize") == 1
