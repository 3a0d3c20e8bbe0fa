"""Where token ids come from, what happens when a source fails, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.base import Payload
from gateway.chat_messages import Obstacle
from gateway.core.errors import EngineUnavailable
from gateway.model_tokenizer import ModelTokenizer
from gateway.tokens import ANY_MODEL, INLINE_BYTES, PromptTokens, Tokenised, TokenLimits, TokenSource
from tests.token_builders import byte_level, chat, loaded

TOKENIZER = byte_level()
PATIENT = TokenLimits(exact_s=60.0, engine_s=60.0, inline_s=60.0)
"""Limits that a busy machine does not run into."""


def payload(body: dict[str, object], *, chars: int = 400, tokens: int | None = None) -> Payload:
    model = body.get("model")
    name = model if isinstance(model, str) else None
    return Payload("r1", "/v1/chat/completions", body, model=name, prompt_chars=chars, prompt_tokens=tokens)


async def once(service: PromptTokens, body: dict[str, object], **options: object) -> Tokenised:
    try:
        return await service.tokenise(payload(body), **options)
    finally:
        await service.aclose()


async def answers(_: dict[str, object]) -> bytes:
    return b'{"count": 3, "max_model_len": 8, "tokens": [5, 6, 7]}'


async def test_a_prompt_of_a_known_model_is_tokenised_exactly(tmp_path: Path) -> None:
    own = loaded(TOKENIZER, tmp_path)
    tokenised = await once(PromptTokens({"m": own}, PATIENT), chat("Hello fox", model="m"))
    text = "<|im_start|>user\nHello fox<|im_end|>\n<|im_start|>assistant\n"
    assert tokenised.source is TokenSource.EXACT
    assert tokenised.ids is not None
    assert tokenised.ids.tolist() == TOKENIZER.encode(text).ids
    assert (tokenised.count, tokenised.obstacle) == (tokenised.ids.size, None)


async def test_a_tokenizer_is_used_only_for_the_models_it_was_given_for(tmp_path: Path) -> None:
    own = loaded(TOKENIZER, tmp_path)
    assert (await once(PromptTokens({"m": own}, PATIENT), chat("Hi", model="n"))).obstacle is Obstacle.NO_TOKENIZER
    assert (await once(PromptTokens({ANY_MODEL: own}, PATIENT), chat("Hi", model="n"))).obstacle is None


@pytest.mark.parametrize("prompt", [[1, 2, 3], [[1, 2, 3]]])
async def test_a_prompt_of_token_ids_is_exact_without_any_tokenizer(prompt: object) -> None:
    tokenised = await once(PromptTokens({}, PATIENT), {"prompt": prompt})
    assert tokenised.source is TokenSource.EXACT
    assert tokenised.ids is not None
    assert tokenised.ids.tolist() == [1, 2, 3]


@pytest.mark.parametrize("prompt", [[], [1, -2], [1, "x"], [1, True], [1, 2**40], 3, None])
async def test_a_prompt_that_is_none_gets_an_estimate(prompt: object) -> None:
    tokenised = await once(PromptTokens({}, PATIENT), {"prompt": prompt})
    assert tokenised.source is TokenSource.ESTIMATE
    assert tokenised.ids is None


async def test_without_a_tokenizer_the_engine_is_asked() -> None:
    tokenised = await once(PromptTokens({}, PATIENT), chat("Hello"), ask_engine=answers)
    assert tokenised.source is TokenSource.ENGINE
    assert tokenised.ids is not None
    assert tokenised.ids.tolist() == [5, 6, 7]
    assert tokenised.obstacle is Obstacle.NO_TOKENIZER


@pytest.mark.parametrize(
    "answer", [b"", b"nonsense", b"[]", b'{"tokens": "x"}', b'{"tokens": [-1]}', b'{"tokens": [4294967296]}', b"\xff"]
)
async def test_an_engine_that_answers_nonsense_leaves_an_estimate(answer: bytes) -> None:
    async def nonsense(_: dict[str, object]) -> bytes:
        return answer

    assert (await once(PromptTokens({}, PATIENT), chat("Hello"), ask_engine=nonsense)).source is TokenSource.ESTIMATE


@pytest.mark.parametrize("error", [EngineUnavailable("no engine"), ConnectionResetError(), TimeoutError()])
async def test_an_engine_that_is_gone_leaves_an_estimate(error: Exception) -> None:
    async def gone(_: dict[str, object]) -> bytes:
        raise error

    assert (await once(PromptTokens({}, PATIENT), chat("Hello"), ask_engine=gone)).source is TokenSource.ESTIMATE


async def test_an_engine_that_is_slow_is_not_waited_for() -> None:
    async def slow(_: dict[str, object]) -> bytes:
        await asyncio.Event().wait()
        return b""

    service = PromptTokens({}, TokenLimits(engine_s=0.01))
    assert (await once(service, chat("Hello"), ask_engine=slow)).source is TokenSource.ESTIMATE


async def test_an_estimate_learns_from_what_engines_report() -> None:
    service = PromptTokens({}, PATIENT, first_ratio=4.0)
    asked = payload(chat("x", model="m"), chars=8000)
    before = await service.tokenise(asked)
    for _ in range(20):
        service.learn(asked, before, prompt_tokens=4000)
    after = await service.tokenise(asked)
    await service.aclose()
    assert (before.source, before.count) == (TokenSource.ESTIMATE, 2000)
    assert 3900 < after.count < 4100


async def test_several_prompts_are_counted_together(tmp_path: Path) -> None:
    service = PromptTokens({ANY_MODEL: loaded(TOKENIZER, tmp_path)}, PATIENT)
    texts = await service.tokenise(payload({"prompt": ["one", "two"]}, chars=400))
    ids = await service.tokenise(payload({"prompt": [[1, 2], [3]]}, chars=0, tokens=3))
    await service.aclose()
    assert (texts.obstacle, texts.count, ids.count) == (Obstacle.SEVERAL_PROMPTS, 100, 3)


async def test_a_crowd_over_the_limit_gets_estimates_at_once(tmp_path: Path) -> None:
    own = loaded(TOKENIZER, tmp_path)
    service = PromptTokens({ANY_MODEL: own}, TokenLimits(threads=1, waiting_count=2, exact_s=60.0))
    crowd = await asyncio.gather(*(service.tokenise(payload(chat("fox " * 20_000 + str(n)))) for n in range(6)))
    await service.aclose()
    assert [told.obstacle for told in crowd].count(Obstacle.BUSY) == 4
    assert [told.obstacle for told in crowd].count(None) == 2


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


async def test_a_template_that_never_ends_is_given_up_on_and_its_thread_comes_back(tmp_path: Path) -> None:
    own = loaded(TOKENIZER, tmp_path, ENDLESS, render_s=60.0)
    service = PromptTokens({ANY_MODEL: own}, TokenLimits(threads=1, exact_s=0.02))
    before = threading.active_count()
    late = await service.tokenise(payload(chat("x")))
    await service.aclose()
    assert late.obstacle is Obstacle.TIMEOUT
    assert threading.active_count() == before


async def test_a_caller_that_leaves_frees_the_thread(tmp_path: Path) -> None:
    own = loaded(TOKENIZER, tmp_path, ENDLESS, render_s=60.0)
    service = PromptTokens({ANY_MODEL: own}, TokenLimits(threads=1, exact_s=60.0))
    leaving = asyncio.create_task(service.tokenise(payload(chat("x"))))
    await asyncio.sleep(0)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    after = await service.tokenise(payload({"prompt": "still here"}))
    await service.aclose()
    assert after.source is TokenSource.EXACT


async def test_closing_ends_every_thread_and_answers_everyone(tmp_path: Path) -> None:
    own = loaded(TOKENIZER, tmp_path, ENDLESS, render_s=60.0)
    before = threading.active_count()
    service = PromptTokens({ANY_MODEL: own}, TokenLimits(threads=2, exact_s=60.0))
    waiting = [asyncio.create_task(service.tokenise(payload(chat(str(n))))) for n in range(5)]
    await asyncio.sleep(0)
    await service.aclose()
    told = await asyncio.gather(*waiting, return_exceptions=True)
    assert threading.active_count() == before
    assert all(isinstance(one, Tokenised) and one.source is TokenSource.ESTIMATE for one in told)


async def test_after_closing_everything_is_an_estimate(tmp_path: Path) -> None:
    service = PromptTokens({ANY_MODEL: loaded(TOKENIZER, tmp_path)}, PATIENT)
    await service.aclose()
    assert (await service.tokenise(payload(chat("x")))).obstacle is Obstacle.BUSY


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "type"]), inner),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(["messages", "prompt", "tools", "chat_template_kwargs", "documents"]), JSON))
def test_no_body_makes_it_raise(body: dict[str, object]) -> None:
    async def run() -> Tokenised:
        return await once(PromptTokens({ANY_MODEL: any_model()}, PATIENT), body, ask_engine=answers)

    told = asyncio.run(run())
    assert (told.ids is None) == (told.source is TokenSource.ESTIMATE)


@cache
def any_model() -> ModelTokenizer:
    with TemporaryDirectory() as folder:
        return loaded(TOKENIZER, Path(folder))


async def test_a_short_request_is_tokenised_at_once_and_gives_what_a_thread_gives(tmp_path: Path) -> None:
    service = PromptTokens({ANY_MODEL: loaded(TOKENIZER, tmp_path)}, PATIENT)
    try:
        short, other = payload(chat("hello")), replace(payload(chat("hello")), body_bytes=INLINE_BYTES)
        inline = service.tokenise(other)
        with pytest.raises(StopIteration) as stopped:
            inline.send(None)  # it never waits for anything
        assert stopped.value.value.ids.tolist() == (await service.tokenise(short)).ids.tolist()
    finally:
        await service.aclose()
