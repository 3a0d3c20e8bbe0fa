"""Writes a tiny random Llama to a directory: `python loadtest/tiny_model.py DIRECTORY`, inside an engine's environment.

Runs as a script because torch, transformers and tokenizers live beside the engine, not beside Sluice. The same versions
of them write the same bytes each time.

The weights are drawn wider than usual. With the default range of 0.02 greedy output hardly depends on the prompt (120
prompts gave 25 distinct outputs), so a hand-off that lost the KV would go unnoticed; with 0.12 every output differs.

They are float32: in bfloat16 a near tie between two tokens falls one way or the other depending on which requests
happened to share a batch (2 of 40 prompts, four at once).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch  # type: ignore[import-not-found]
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # type: ignore[import-not-found]

SEED = 7
VOCABULARY_TOKENS = 384
BEGIN, END, TURN = "<s>", "</s>", "<turn>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<turn>{{ message['role'] }}\n{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
SENTENCES = (
    "The river carries the boats past the old mill and under the stone bridge.",
    "A sluice lets as much water through as the wheel below can take, and holds the rest.",
    "When the gate opens, the water runs; when it closes, the pond rises behind it.",
    "Every morning the miller reads the mark on the wall and sets the gate by it.",
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `SENTENCES`, at most `VOCABULARY_TOKENS` entries, with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_TOKENS,
        special_tokens=[BEGIN, END, TURN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, chat_template=CHAT_TEMPLATE
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Three layers of random float32 weights, some 8 MB, fixed by `SEED`."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=32768,
        initializer_range=0.12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config).to(torch.float32)


def save(directory: Path) -> None:
    """Write model and tokenizer into the directory, which is made when missing."""
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(directory)
    build_model(tokenizer).save_pretrained(directory)


if __name__ == "__main__":
    save(Path(sys.argv[1]))
