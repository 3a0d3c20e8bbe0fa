"""Model directories that are whole, odd or broken, and texts that are hard."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gateway import model_directory
from gateway.chat_messages import NotRenderable, Obstacle
from gateway.core.errors import ConfigError
from gateway.model_tokenizer import ModelTokenizer, TokenizerLimits
from tests.token_builders import TEMPLATE, byte_level, chat, corpus, loaded, metaspace, saved, word_piece

TOKENIZER = byte_level()


def never() -> bool:
    return False


def obstacle(model: ModelTokenizer, body: dict[str, object]) -> Obstacle:
    with pytest.raises(NotRenderable) as caught:
        model.chat_ids(body, never)
    return caught.value.obstacle


@pytest.mark.parametrize(
    "text", ["", " ", "\x00", "a\u0301\u0300", "🙂\u200d🙂", "<|im_end|>", "\ufffe", "﷽" * 3, "a" * 50_000, "\n" * 5000]
)
def test_odd_texts_give_the_tokens_of_the_library(text: str, tmp_path: Path) -> None:
    assert loaded(TOKENIZER, tmp_path).encode(text).tolist() == TOKENIZER.encode(text).ids


@pytest.mark.parametrize("text", ["\ud800", "a" * 20_000 + "\udfff"])
def test_a_lone_surrogate_is_no_text(text: str, tmp_path: Path) -> None:
    assert obstacle(loaded(TOKENIZER, tmp_path), chat(text)) is Obstacle.NOT_UNICODE


def test_a_growing_conversation_is_encoded_only_where_it_grew(tmp_path: Path) -> None:
    model = loaded(TOKENIZER, tmp_path)
    turns = [corpus(seed, 2000) for seed in range(7)]
    model.chat_ids(chat(*turns[:5]), never)
    entries = len(model.cache)
    grown = model.chat_ids(chat(*turns), never)
    assert grown.tolist() == loaded(TOKENIZER, tmp_path).chat_ids(chat(*turns), never).tolist()
    assert 0 < len(model.cache) - entries <= 5


def test_the_cache_keeps_within_its_bytes_and_a_tiny_one_changes_no_tokens(tmp_path: Path) -> None:
    small, large = loaded(TOKENIZER, tmp_path, cache_bytes=20_000), loaded(TOKENIZER, tmp_path)
    for seed in range(5):
        text = corpus(seed)
        assert small.encode(text).tolist() == large.encode(text).tolist()
        assert small.cache.used_bytes <= 20_000


def test_threads_share_a_tokenizer(tmp_path: Path) -> None:
    model = loaded(TOKENIZER, tmp_path, cache_bytes=50_000)
    texts = [corpus(seed % 3, 1500) for seed in range(24)]
    with ThreadPoolExecutor(4) as threads:
        together = [ids.tolist() for ids in threads.map(model.encode, texts)]
    assert together == [TOKENIZER.encode(text).ids for text in texts]
    assert not [thread for thread in threading.enumerate() if "tokens" in thread.name]


def test_special_tokens_stand_around_a_completion_but_not_around_a_chat(tmp_path: Path) -> None:
    model = loaded(word_piece(), tmp_path)
    plain = model.encode("the fox").tolist()
    assert model.text_ids("the fox", {}, never).tolist() == [1, *plain, 2]
    assert model.text_ids("the fox", {"add_special_tokens": False}, never).tolist() == plain
    assert model.chat_ids(chat("the fox"), never).tolist()[0] != 1


def test_named_special_tokens_become_added_tokens_and_reach_the_template(tmp_path: Path) -> None:
    path = saved(TOKENIZER, tmp_path, "{{ bos_token }}{{ messages[0].content }}", bos_token={"content": "<bos>"})
    ids = ModelTokenizer.load(path).chat_ids(chat("fox"), never).tolist()
    assert ids[0] == TOKENIZER.get_vocab_size()
    assert ids[1:] == TOKENIZER.encode("fox").ids


def test_truncation_and_padding_of_the_file_do_not_count(tmp_path: Path) -> None:
    tokenizer = metaspace(split=True, scheme="always")
    whole = tokenizer.encode("the quick fox jumps", add_special_tokens=False).ids
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=64)
    assert loaded(tokenizer, tmp_path).encode("the quick fox jumps").tolist() == whole


def test_a_text_over_the_limit_is_not_tokenised_here(tmp_path: Path) -> None:
    assert obstacle(loaded(TOKENIZER, tmp_path, text_chars=100), chat("fox " * 50)) is Obstacle.TOO_LONG


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (chat("x", chat_template="{{ 1 }}"), Obstacle.REQUEST_TEMPLATE),
        (chat("x", truncate_prompt_tokens=5), Obstacle.UNKNOWN_FIELD),
        (chat("x", chat_template_kwargs={"tokenize": True}), Obstacle.UNKNOWN_FIELD),
        (chat("x", chat_template_kwargs=[]), Obstacle.NOT_A_PROMPT),
        (chat("x", add_generation_prompt="yes"), Obstacle.UNKNOWN_FIELD),
        (chat("x", tools=[]), Obstacle.NOT_A_PROMPT),
        (chat("x", tools=[{"function": {}}]), Obstacle.NOT_A_PROMPT),
        (chat("x", continue_final_message=True), Obstacle.NOT_A_PROMPT),
        ({"messages": []}, Obstacle.NOT_A_PROMPT),
        ({"messages": ["x"]}, Obstacle.NOT_A_PROMPT),
        ({"messages": [{"role": "user", "content": 3}]}, Obstacle.NOT_A_PROMPT),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, Obstacle.MEDIA),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "uuid": "1"}]}]}, Obstacle.MEDIA),
    ],
)
def test_a_body_that_cannot_be_told_exactly_says_why(body: dict[str, object], reason: Obstacle, tmp_path: Path) -> None:
    assert obstacle(loaded(TOKENIZER, tmp_path), body) is reason


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no') }}", Obstacle.TEMPLATE_ERROR),
        ("{{ messages[0].content.missing.more }}", Obstacle.TEMPLATE_ERROR),
        ("{{ 1 / 0 }}", Obstacle.TEMPLATE_ERROR),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", Obstacle.TEMPLATE_LIMIT),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", Obstacle.TEMPLATE_LIMIT),
        ("{% for a in range(99999) %}{{ messages[0].content }}{% endfor %}", Obstacle.TEMPLATE_LIMIT),
    ],
)
def test_a_template_that_fails_says_how(template: str, reason: Obstacle, tmp_path: Path) -> None:
    model = loaded(TOKENIZER, tmp_path, template, render_s=0.05, text_chars=100_000)
    assert obstacle(model, chat("fox " * 100)) is reason


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", None),
        ("tokenizer.json", ""),
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}'),
        ("tokenizer.json", '{"model": {"type": "Unheard"}}'),
        ("tokenizer.json", '{"model": {"type": "BPE", "dropout": 0.1, "vocab": {}, "merges": []}}'),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("chat_template.jinja", "{% if %}"),
        ("chat_template.jinja", "{{ x"),
        ("chat_template.jinja", "\ud800"),
    ],
)
def test_a_broken_directory_is_refused_at_the_start(name: str, text: str | None, tmp_path: Path) -> None:
    path = saved(TOKENIZER, tmp_path) / name
    if text is None:
        path.unlink()
    else:
        path.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(ConfigError, match=r"^tokens\.tokenizer"):
        ModelTokenizer.load(tmp_path)


def test_a_file_over_the_size_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_directory, "LIMIT_BYTES", 1000)
    with pytest.raises(ConfigError, match="more than 1000 bytes"):
        ModelTokenizer.load(saved(TOKENIZER, tmp_path))


def test_the_path_of_the_file_itself_is_taken_too(tmp_path: Path) -> None:
    path = saved(TOKENIZER, tmp_path) / "tokenizer.json"
    assert ModelTokenizer.load(path, TokenizerLimits()).encode("fox").size > 0


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": "{}"},
        {"config.json": '{"architectures": ["GptOssForCausalLM"]}'},
        {"tekken.json": "{}"},
        {"chat_template.json": '{"chat_template": "another"}'},
    ],
)
def test_a_model_whose_engine_renders_otherwise_has_no_template(files: dict[str, str], tmp_path: Path) -> None:
    saved(TOKENIZER, tmp_path)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    model = ModelTokenizer.load(tmp_path)
    assert obstacle(model, chat("x")) is Obstacle.NO_TEMPLATE
    assert model.text_ids("fox", {}, never).size > 0


def test_template_files_beat_the_config_and_tools_choose_their_own(tmp_path: Path) -> None:
    saved(TOKENIZER, tmp_path, "config")
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    model = ModelTokenizer.load(tmp_path)
    assert (
        model.chat_ids(chat("x", tools=[{"function": {"name": "f"}}]), never).tolist() == TOKENIZER.encode("tools").ids
    )
    assert model.chat_ids(chat("x"), never)[0] == TOKENIZER.token_to_id("<|im_start|>")


def test_the_file_of_legacy_special_tokens_is_read(tmp_path: Path) -> None:
    saved(TOKENIZER, tmp_path, "{{ eos_token }}")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "</s>", "lstrip": False}}))
    assert ModelTokenizer.load(tmp_path).chat_ids(chat("x"), never).tolist() == [TOKENIZER.token_to_id("</s>")]
