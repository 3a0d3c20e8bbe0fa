"""What the files of a model directory say about its tokenizer: read once at the start, never again.

Source: transformers 5.19.0, `PreTrainedTokenizerBase._from_pretrained` (precedence of the files).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import msgspec

from gateway.core.errors import ConfigError
from gateway.token_cuts import AddedTokenFacts

LIMIT_BYTES = 256 << 20
"""Largest file that is read: the largest known tokenizer.json has some 35 MB."""

_OWN_RENDERERS = frozenset(
    {
        "DeepseekV32ForCausalLM",
        "DeepseekV41ForCausalLM",
        "DeepseekV4ForCausalLM",
        "DeepseekV4ForConditionalGeneration",
        "GptOssForCausalLM",
        "InklingForCausalLM",
        "InklingForConditionalGeneration",
        "KimiK3ForConditionalGeneration",
        "MoonshotKimiaForCausalLM",
    }
)
"""Architectures whose chat prompts vLLM renders in code of its own, not with the template. Source: vLLM 0.32.0,
config/model.py (tokenizer modes) and renderers/online_renderer.py (Harmony)."""


class _Model(msgspec.Struct):
    type: str | None = None
    dropout: float | None = None


class _TokenizerJson(msgspec.Struct):
    """The parts of tokenizer.json that are looked at here; the vocabulary is skipped over."""

    model: _Model
    normalizer: object = None
    pre_tokenizer: object = None


@dataclass(frozen=True, slots=True)
class ModelDirectory:
    """A model directory's tokenizer files, parsed as far as needed."""

    tokenizer_json: str
    normalizer: object
    pre_tokenizer: object
    templates: dict[str, str]
    """Chat templates by name; empty when there is none, or when the engine would not use it."""
    special_tokens: dict[str, str]
    """Named special tokens (`bos_token` and so on) as templates see them."""
    added_tokens: tuple[AddedTokenFacts, ...]
    """Tokens that the tokenizer must have as added tokens, whatever tokenizer.json says."""

    @classmethod
    def load(cls, path: Path) -> ModelDirectory:
        """The directory's files. Raises ConfigError when one is missing, broken or too large."""
        text = _text(path / "tokenizer.json")
        if text is None:
            raise ConfigError(f"tokens.tokenizer: {path} has no tokenizer.json")
        parsed = _parsed_tokenizer(text)
        config = _object(path / "tokenizer_config.json")
        if "added_tokens_decoder" not in config:
            config |= _object(path / "special_tokens_map.json")
        named = _special_tokens(config)
        return cls(
            tokenizer_json=text,
            normalizer=parsed.normalizer,
            pre_tokenizer=parsed.pre_tokenizer,
            templates=_templates(path, config),
            special_tokens={name: token.content for name, token in named.items()},
            added_tokens=tuple({token.content: token for token in (*_decoder(config), *named.values())}.values()),
        )


def _parsed_tokenizer(text: str) -> _TokenizerJson:
    try:
        parsed = msgspec.json.decode(text, type=_TokenizerJson)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"tokens.tokenizer: tokenizer.json is broken: {error}") from error
    if parsed.model.dropout:
        raise ConfigError("tokens.tokenizer: tokenizer.json has dropout: the same text has no fixed token ids")
    return parsed


def _templates(path: Path, config: dict[str, object]) -> dict[str, str]:
    templates = _tokenizer_templates(path, config)
    processor = _object(path / "chat_template.json").get("chat_template")
    is_disputed = processor is not None and processor != templates.get("default")
    return {} if is_disputed or _is_rendered_otherwise(path) else templates


def _tokenizer_templates(path: Path, config: dict[str, object]) -> dict[str, str]:
    default = _text(path / "chat_template.jinja")
    extra = {file.stem: _text(file) or "" for file in sorted((path / "additional_chat_templates").glob("*.jinja"))}
    if default is not None:
        return {**extra, "default": default}
    given = config.get("chat_template")
    if isinstance(given, str):
        given = {"default": given}
    elif isinstance(given, list):
        given = {item["name"]: item["template"] for item in given if isinstance(item, dict) and "name" in item}
    if not isinstance(given, dict):
        given = {}
    return {**extra, **{name: source for name, source in given.items() if isinstance(source, str)}}


def _is_rendered_otherwise(path: Path) -> bool:
    """Whether the engine makes chat prompts of this model from something else than the tokenizer's template."""
    if (
        (path / "tekken.json").exists()
        or any(path.glob("tokenizer.model.v*"))
        or (path / "chat_template.json").exists()
    ):
        return True
    architectures = _object(path / "config.json").get("architectures")
    return isinstance(architectures, list) and any(name in _OWN_RENDERERS for name in architectures)


def _special_tokens(config: dict[str, object]) -> dict[str, AddedTokenFacts]:
    extra = config.get("extra_special_tokens")
    named = {key: value for key, value in config.items() if key.endswith("_token")}
    if isinstance(extra, dict):
        named |= extra
    return {name: facts for name, value in named.items() if (facts := _facts(value)) is not None}


def _decoder(config: dict[str, object]) -> list[AddedTokenFacts]:
    """The tokens of `added_tokens_decoder` in the order of their ids."""
    decoder = config.get("added_tokens_decoder")
    if not isinstance(decoder, dict) or not all(str(index).isdigit() for index in decoder):
        return []
    ordered = sorted(decoder.items(), key=lambda item: int(item[0]))
    return [facts for _, value in ordered if (facts := _facts(value)) is not None]


def _facts(value: object) -> AddedTokenFacts | None:
    if isinstance(value, str):
        return AddedTokenFacts(value)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        return None
    flags = [value.get(key) is True for key in ("normalized", "lstrip", "rstrip", "single_word")]
    return AddedTokenFacts(value["content"], *flags)


def _object(path: Path) -> dict[str, object]:
    text = _text(path)
    if text is None:
        return {}
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"tokens.tokenizer: {path.name} is broken: {error}") from error
    if not isinstance(parsed, dict):
        raise ConfigError(f"tokens.tokenizer: {path.name} is not an object")
    return parsed


def _text(path: Path) -> str | None:
    try:
        if path.stat().st_size > LIMIT_BYTES:
            raise ConfigError(f"tokens.tokenizer: {path.name} has more than {LIMIT_BYTES} bytes")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"tokens.tokenizer: {path} cannot be read: {error}") from error
