"""Small tokenizers of every kind there is, trained in the test, and texts that are hard for them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from gateway.model_tokenizer import ModelTokenizer, TokenizerLimits
from gateway.token_cuts import DIVIDING_PATTERNS

MARKERS = ["<|im_start|>", "<|im_end|>", "<s>", "</s>"]
WORDS = ["the", "quick", "fox", "jumps", "isn't", "they'll", "naïve", "Größe", "東京", "привет"]
WORDS += ["x1", "12345", "3.14", "a", "b", "ab", "abc"]


def corpus(seed: int = 1, words: int = 3000) -> str:
    """Repeatable text with words, numbers, punctuation and several scripts."""
    rng = random.Random(seed)
    ends = [" ", " ", " ", " ", "  ", "\n", ", ", ". ", ".\n\n", "\t", "-", ""]
    return "".join(rng.choice(WORDS) + rng.choice(ends) for _ in range(words))


def _trained(tokenizer: Tokenizer, trainer: object, markers: list[str | AddedToken] | None = None) -> Tokenizer:
    tokenizer.train_from_iterator([corpus()], trainer)
    tokenizer.add_special_tokens(MARKERS if markers is None else markers)
    return tokenizer


def _bpe(**options: object) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(vocab_size=500, show_progress=False, **options)


def byte_level(pattern: str | None = None, *, normalizer: object = None, add_prefix_space: bool = False) -> Tokenizer:
    """BPE on bytes: GPT-2's own regex, or a Split with another one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    steps = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    level = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=pattern is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, level]) if steps else level
    return _trained(tokenizer, _bpe(initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))


def metaspace(*, split: bool, scheme: str) -> Tokenizer:
    """BPE in the manner of SentencePiece. Without `split`, a whole text is one word to it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    _trained(tokenizer, _bpe(special_tokens=["<unk>"]))
    described = json.loads(tokenizer.to_str())
    described["pre_tokenizer"]["split"] = split
    return Tokenizer.from_str(json.dumps(described))


def llama2() -> Tokenizer:
    """BPE behind normalizers that prepend and replace, with no pre-tokenizer at all."""
    tokenizer = metaspace(split=False, scheme="never")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    described = json.loads(tokenizer.to_str())
    described["pre_tokenizer"] = None
    return Tokenizer.from_str(json.dumps(described))


def word_piece() -> Tokenizer:
    """BERT: words, accents stripped, lower case, Chinese characters apart, [CLS] and [SEP] around."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    _trained(tokenizer, trainers.WordPieceTrainer(vocab_size=500, special_tokens=special, show_progress=False))
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return tokenizer


def unigram(normalizer: object = None) -> Tokenizer:
    """T5 and its kind."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    trainer = trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    return _trained(tokenizer, trainer)


def flagged() -> Tokenizer:
    """Added tokens with every flag that reaches beyond their own text, and some that look alike or hold spaces."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True), AddedToken("<r>", rstrip=True)])
    tokenizer.add_tokens(
        [AddedToken("word", rstrip=True), AddedToken("fox jumps"), AddedToken("lone", single_word=True), "<|im"]
    )
    return tokenizer


def overlapping() -> Tokenizer:
    """An added token that can begin before a marker and take its first character."""
    tokenizer = byte_level()
    tokenizer.add_tokens(["<<", "</<"])
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level, GPT-2": byte_level,
    "byte level, GPT-2, prefix space": lambda: byte_level(add_prefix_space=True),
    "byte level, flagged tokens": flagged,
    "byte level, overlapping tokens": overlapping,
    "metaspace, first": lambda: metaspace(split=True, scheme="first"),
    "metaspace, always": lambda: metaspace(split=True, scheme="always"),
    "metaspace without split, first": lambda: metaspace(split=False, scheme="first"),
    "metaspace without split, always": lambda: metaspace(split=False, scheme="always"),
    "llama 2": llama2,
    "WordPiece": word_piece,
    "Unigram": unigram,
    "Unigram, stripped": lambda: unigram(normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])),
} | {
    f"byte level, pattern {number}": lambda pattern=pattern, form=form: byte_level(pattern, normalizer=form())
    for number, (pattern, form) in enumerate(
        zip(sorted(DIVIDING_PATTERNS), [normalizers.NFC, normalizers.NFKC, normalizers.NFD] * 2, strict=True)
    )
}

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def saved(tokenizer: Tokenizer, path: Path, template: str = TEMPLATE, **config: object) -> Path:
    """The tokenizer as a model directory."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, **config}))
    return path


def loaded(tokenizer: Tokenizer, path: Path, template: str = TEMPLATE, **limits: object) -> ModelTokenizer:
    """The tokenizer, saved and loaded as the gateway does."""
    return ModelTokenizer.load(saved(tokenizer, path, template), TokenizerLimits(**limits))


def chat(*contents: str, **more: object) -> dict[str, object]:
    """A chat body: user and assistant in turns."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[at % 2], "content": text} for at, text in enumerate(contents)], **more}
