"""Seeded prompts between 1 and 6,000 tokens, and asking them of anything that speaks the OpenAI API."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import aiohttp

from loadtest.vllm_process import MODEL
from tests.engines.shapes import sse_data

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PREFILL_LEG = {
    "max_tokens": 1,
    "stream": False,
    "kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False},
}
# Each is one token of the tiny model's tokenizer when a space stands before it.
WORDS = (
    *("the", "and", "mill", "water", "gate", "lets", "much", "reads", "runs", "when", "wall", "wheel", "can", "old"),
    *("opens", "sets", "stone", "pond", "miller", "rises", "river", "holds", "under", "take", "through", "below"),
    *("bridge", "behind", "boats", "mark"),
)
TOKEN_IDS = range(259, 384)
"""The tokens of several letters. Single bytes could end a prompt in half a character, whose text vLLM then repeats."""
LENGTHS_TOKENS = (1, 2, 127, 128, 129, 500, 1000, 2000, 4000, 5980)
"""Around one KV block of 128 tokens, and up to 6,000 with the chat template's share."""
OUTPUT_TOKENS = 12


class AskFailed(Exception):
    """The answer was an error, or a stream that did not end as streams do."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request to be asked at temperature 0."""

    name: str
    path: str
    body: dict[str, object] = field(repr=False)
    is_stream: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back. Two answers are equal when text, finish reason and token counts are."""

    text: str
    finish_reason: str
    prompt_tokens: int
    output_tokens: int
    headers: Mapping[str, str] = field(compare=False, repr=False)


def words(rng: random.Random, count: int) -> str:
    """So many random words: as many tokens."""
    return "".join(f" {rng.choice(WORDS)}" for _ in range(count))


def prompt_input(rng: random.Random, path: str, is_stream: bool, tokens: int) -> dict[str, object]:
    """The part of the body that is the prompt: messages, text, or (completions, not streamed) token ids."""
    if path == CHAT:
        return {"messages": [{"role": "user", "content": words(rng, tokens)}]}
    if is_stream:
        return {"prompt": words(rng, tokens)}
    return {"prompt": rng.choices(TOKEN_IDS, k=tokens)}


def make_prompts(seed: int, lengths_tokens: Iterable[int] = LENGTHS_TOKENS) -> list[Prompt]:
    """Four prompts of each length: chat and completions, streamed and not. No two begin alike."""
    rng = random.Random(seed)
    prompts = []
    for tokens in lengths_tokens:
        for path in (CHAT, COMPLETIONS):
            for is_stream in (False, True):
                body = {"model": MODEL, "temperature": 0, "max_tokens": OUTPUT_TOKENS}
                body |= prompt_input(rng, path, is_stream, tokens)
                if is_stream:
                    body |= {"stream": True, "stream_options": {"include_usage": True}}
                name = f"{path.split('/')[2]}-{'stream' if is_stream else 'whole'}-{tokens}"
                prompts.append(Prompt(name, path, body, is_stream))
    return prompts


async def ask(session: aiohttp.ClientSession, url: str, prompt: Prompt, **more: object) -> Answer:
    """The answer of the server at the base URL; `more` is added to the body. Raises AskFailed for any error."""
    async with session.post(url + prompt.path, json=prompt.body | more) as response:
        body = await response.read()
        if response.status != 200:
            raise AskFailed(f"{prompt.name}: {response.status} {body[:500]!r}")
        if prompt.is_stream:
            return streamed_answer(prompt, body, response.headers)
        return whole_answer(json.loads(body), response.headers)


def text_of(choice: dict[str, object]) -> str:
    """The text of a choice: of a message, of a message's delta, or of a completion."""
    part = choice.get("message", choice.get("delta"))
    text = part.get("content") if isinstance(part, dict) else choice.get("text")
    return text if isinstance(text, str) else ""


def whole_answer(body: dict[str, object], headers: Mapping[str, str]) -> Answer:
    """The answer in a response that was not streamed."""
    (choice,) = body["choices"]
    usage = body["usage"]
    return Answer(text_of(choice), choice["finish_reason"], usage["prompt_tokens"], usage["completion_tokens"], headers)


def streamed_answer(prompt: Prompt, body: bytes, headers: Mapping[str, str]) -> Answer:
    """The answer in a whole stream with usage. Raises AskFailed for an error event or a stream without its end."""
    *chunks, last = sse_data(body)
    if last != "[DONE]":
        raise AskFailed(f"{prompt.name}: the stream ends with {last!r}")
    text, finish_reason, usage = "", None, None
    for chunk in chunks:
        if "error" in chunk:
            raise AskFailed(f"{prompt.name}: {chunk}")
        for choice in chunk["choices"]:
            text += text_of(choice)
            finish_reason = choice["finish_reason"] or finish_reason
        usage = chunk.get("usage") or usage
    if usage is None or finish_reason is None:
        raise AskFailed(f"{prompt.name}: a stream without usage or finish reason: {body[-500:]!r}")
    return Answer(text, finish_reason, usage["prompt_tokens"], usage["completion_tokens"], headers)


async def hand_off(session: aiohttp.ClientSession, prefill_url: str, decode_url: str, prompt: Prompt) -> Answer:
    """The answer made by two engines: the prompt's KV from one, the tokens from the other."""
    params = await prefill(session, prefill_url, prompt)
    return await ask(session, decode_url, prompt, kv_transfer_params=params)


async def prefill(session: aiohttp.ClientSession, url: str, prompt: Prompt) -> dict[str, object]:
    """The transfer parameters of a prefill leg."""
    body = {key: value for key, value in prompt.body.items() if key != "stream_options"} | PREFILL_LEG
    async with session.post(url + prompt.path, json=body) as response:
        answer = await response.json()
        if response.status != 200 or not answer["kv_transfer_params"]:
            raise AskFailed(f"prefill of {prompt.name}: {response.status} {answer}")
        return answer["kv_transfer_params"]


def wrong_answers(answers: Mapping[str, Answer], references: Mapping[str, Answer]) -> list[str]:
    """A line for each answer that differs from its reference, empty when all are right."""
    return [f"{name}: {got} instead of {references[name]}" for name, got in answers.items() if got != references[name]]
