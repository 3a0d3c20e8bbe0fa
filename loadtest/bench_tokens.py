"""`sluice bench tokens`: what tokenising long prompts costs, and how long it ever keeps the event loop waiting.

It trains its own tokenizer on generated text, needs no network and no engine, and measures three things: a chat
prompt's first turn, its next turn (whose beginning is cached), and the loop's longest stall while many such prompts
arrive at once. On a machine that others use too, the operating system alone keeps a loop waiting. Two figures tell
that apart: the part of each stall in which this process was running at all (an upper bound of what tokenising is to
blame for), and the longest stall of an idle loop.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from adapters.base import Payload
from gateway.model_tokenizer import ModelTokenizer, TokenizerLimits
from gateway.tokens import ANY_MODEL, PromptTokens, TokenLimits, TokenSource

_VOCABULARY = 32_000
_KNOWN_WORDS, _WORDS = 20_000, 300_000
"""The vocabulary is trained on the commonest words only: prose has words that a vocabulary does not."""

_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Llama 3's."""

_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_PROBE_S = 0.0005
"""How often the stall probe asks the loop for a turn."""


@dataclass(frozen=True, slots=True)
class TokenFigures:
    """What was measured; times in seconds, medians where `repeats` is over 1."""

    prompt_bytes: int
    prompt_tokens: int
    chars_per_token: float
    first_turn_s: float
    next_turn_s: float
    next_to_first_ratio: float
    single_message_s: float
    """One message of that size: no marker to cut at, so it is cut between words."""
    prompts_at_once: int
    longest_stall_s: float
    stall_p99_s: float
    longest_own_stall_s: float
    """Longest stall, counting of each only as much as this process had the processor."""
    idle_longest_stall_s: float
    """The same probe for the same time with nothing to do: what the machine itself does to a loop."""
    all_done_s: float
    threads: int


def main(argv: Sequence[str]) -> int:
    """Runs the bench and prints a table, or JSON with `--json`. Exit status 0."""
    parser = argparse.ArgumentParser(prog="sluice bench tokens", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--prompt-bytes", type=int, default=100_000)
    parser.add_argument("--prompts", type=int, default=50, help="how many arrive at once")
    parser.add_argument("--threads", type=int, default=TokenLimits().threads)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--training-chars", type=int, default=4_000_000, help="text the tokenizer is trained on")
    options = parser.parse_args(argv)
    figures = measure(
        prompt_bytes=options.prompt_bytes,
        prompts=options.prompts,
        threads=options.threads,
        repeats=options.repeats,
        seed=options.seed,
        training_chars=options.training_chars,
    )
    print(json.dumps(asdict(figures)) if options.json else _table(figures))
    return 0


def measure(
    *, prompt_bytes: int, prompts: int, threads: int, repeats: int, seed: int, training_chars: int
) -> TokenFigures:
    """The figures for prompts of about `prompt_bytes`, `prompts` of them arriving at once."""
    rng = random.Random(seed)
    words = made_up_words(rng, _WORDS)
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), made_up_text(rng, words[:_KNOWN_WORDS], training_chars))
        return asyncio.run(_measured(Path(folder), rng, words, prompt_bytes, prompts, threads, repeats))


async def _measured(
    folder: Path, rng: random.Random, words: list[str], prompt_bytes: int, prompts: int, threads: int, repeats: int
) -> TokenFigures:
    service = PromptTokens(
        {ANY_MODEL: ModelTokenizer.load(folder, TokenizerLimits(cache_bytes=256 << 20))},
        TokenLimits(threads=threads, exact_s=600.0),
    )
    try:
        first_s, next_s, single_s = [], [], []
        for _ in range(repeats):
            turns = _conversation(rng, words, prompt_bytes)
            first_s.append((await _timed(service, turns))[1])
            answer = {"role": "assistant", "content": made_up_text(rng, words, 1000)}
            question = {"role": "user", "content": made_up_text(rng, words, 200)}
            next_s.append((await _timed(service, [*turns, answer, question]))[1])
            single_s.append(
                (await _timed(service, [{"role": "user", "content": made_up_text(rng, words, prompt_bytes)}]))[1]
            )
        tokens, _ = await _timed(service, turns)
        crowd = [_payload(_conversation(rng, words, prompt_bytes)) for _ in range(prompts)]
        started = time.perf_counter()
        stalls = await _stalls(asyncio.gather(*(service.tokenise(payload) for payload in crowd)))
        all_done_s = time.perf_counter() - started
        idle = await _stalls(asyncio.sleep(all_done_s))
    finally:
        await service.aclose()
    size = _payload(turns).prompt_chars
    return TokenFigures(
        prompt_bytes=size,
        prompt_tokens=tokens,
        chars_per_token=size / tokens,
        first_turn_s=statistics.median(first_s),
        next_turn_s=statistics.median(next_s),
        next_to_first_ratio=statistics.median(next_s) / statistics.median(first_s),
        single_message_s=statistics.median(single_s),
        prompts_at_once=prompts,
        longest_stall_s=max(stalls.wall_s),
        stall_p99_s=sorted(stalls.wall_s)[int(len(stalls.wall_s) * 0.99)],
        longest_own_stall_s=max(stalls.own_s),
        idle_longest_stall_s=max(idle.wall_s),
        all_done_s=all_done_s,
        threads=threads,
    )


async def _timed(service: PromptTokens, messages: list[dict[str, str]]) -> tuple[int, float]:
    tokenised = await service.tokenise(_payload(messages))
    if tokenised.source is not TokenSource.EXACT:
        raise RuntimeError(f"the bench's own prompt was not tokenised exactly: {tokenised.obstacle}")
    return tokenised.count, tokenised.elapsed_s


@dataclass(frozen=True, slots=True)
class _Stalls:
    wall_s: list[float]
    own_s: list[float]


async def _stalls(work: Awaitable[object]) -> _Stalls:
    """How much later than asked the loop came back to a timer, each time, in seconds, while `work` went on."""
    stalls = _Stalls([0.0], [0.0])
    task = asyncio.ensure_future(work)
    while not task.done():
        wall, own = time.perf_counter(), time.process_time()
        await asyncio.sleep(_PROBE_S)
        late_s = max(0.0, time.perf_counter() - wall - _PROBE_S)
        stalls.wall_s.append(late_s)
        stalls.own_s.append(min(late_s, time.process_time() - own))
    await task
    return stalls


def _payload(messages: list[dict[str, str]]) -> Payload:
    chars = sum(len(message["content"]) for message in messages)
    body: dict[str, object] = {"model": "bench", "messages": messages}
    return Payload(request_id="bench", path="/v1/chat/completions", body=body, model="bench", prompt_chars=chars)


def _conversation(rng: random.Random, words: list[str], size_bytes: int) -> list[dict[str, str]]:
    """A system prompt and turns of uneven length, about `size_bytes` in all, the last one the user's."""
    messages = [{"role": "system", "content": made_up_text(rng, words, size_bytes // 10)}]
    left = size_bytes - size_bytes // 10
    while left > 0:
        length = min(left, rng.randrange(200, 6000))
        messages.append(
            {"role": ("user", "assistant")[len(messages) % 2 == 0], "content": made_up_text(rng, words, length)}
        )
        left -= length
    return messages


def made_up_words(rng: random.Random, count: int) -> list[str]:
    """Made-up words of one to four syllables, the earlier the commoner."""
    onsets = ["b", "c", "d", "f", "g", "h", "l", "m", "n", "p", "r", "s", "t", "v", "w", "st", "tr", "pr", "ch", "sh"]
    vowels, codas = ["a", "e", "i", "o", "u", "ea", "ou", "io"], ["", "", "n", "r", "s", "t", "l", "nd", "ng"]
    return [
        "".join(
            rng.choice(onsets) + rng.choice(vowels) + rng.choice(codas) for _ in range(rng.choice((1, 1, 2, 2, 3, 4)))
        )
        for _ in range(count)
    ]


def made_up_text(rng: random.Random, words: list[str], size_chars: int) -> str:
    """About `size_chars` of words by Zipf's law, with numbers, punctuation, capitals and line ends."""
    pieces: list[str] = []
    size = 0
    while size < size_chars:
        word = words[min(len(words) - 1, int(len(words) ** rng.random()) - 1)]
        chance = rng.random()
        if chance < 0.08:
            word = word.capitalize()
        elif chance < 0.13:
            word += rng.choice((",", ".", ".\n", ";", ":", "()", "\n\n"))
        elif chance > 0.97:
            word = str(rng.randrange(10_000))
        pieces.append(word)
        size += len(word) + 1
    return " ".join(pieces)


def save_model(folder: Path, corpus: str) -> None:
    """Trains a byte-level BPE tokenizer on the text and writes it with a chat template, as a model has them."""
    tokenizer = Tokenizer(BPE())
    split = pre_tokenizers.Split(Regex(_PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([corpus], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": _TEMPLATE}))


def _table(figures: TokenFigures) -> str:
    rows = [
        ("prompt", f"{figures.prompt_bytes} bytes, {figures.prompt_tokens} tokens"),
        ("characters per token", f"{figures.chars_per_token:.2f}"),
        ("first turn", f"{figures.first_turn_s * 1e3:.1f} ms"),
        ("next turn", f"{figures.next_turn_s * 1e3:.1f} ms ({figures.next_to_first_ratio:.2f} of the first)"),
        ("one message of that size", f"{figures.single_message_s * 1e3:.1f} ms"),
        (f"{figures.prompts_at_once} at once, {figures.threads} threads", f"{figures.all_done_s * 1e3:.0f} ms for all"),
        ("longest stall of the loop", f"{figures.longest_stall_s * 1e3:.2f} ms (goal: under 5 ms)"),
        ("of it, this process ran", f"{figures.longest_own_stall_s * 1e3:.2f} ms"),
        ("stall, 99th percentile", f"{figures.stall_p99_s * 1e3:.2f} ms"),
        ("longest stall, loop idle", f"{figures.idle_longest_stall_s * 1e3:.2f} ms (the machine's own)"),
    ]
    return "\n".join(f"{name:<28}{value}" for name, value in rows)
