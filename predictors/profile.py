"""Profiles: what one engine on one kind of hardware takes, as a handful of numbers that each name their source.

Two forms of file give the same `Profile`. A *roofline* states hardware and model (FLOP, bytes, efficiency) and the
coefficients follow; a *measured* one states the coefficients, as `predictors/fit.py` writes them. The engine model and
the closed-form predictor both read a `Profile`, so that a simulation and a prediction can be made to agree exactly, or
to differ on purpose. `load_profile` is the only function of this package that touches a file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path

import msgspec

from gateway.core.errors import ConfigError

PROFILES_DIR = Path(__file__).parent / "profiles"
MAX_FILE_BYTES = 1 << 20
"""A profile is a page of text; a larger file is some other file."""

_MAY_BE_ZERO = frozenset(
    {
        "prefill_base_s",
        "prefill_floor_s",
        "prefill_s_per_square_token",
        "decode_base_s",
        "decode_s_per_sequence",
        "decode_s_per_kv_token",
        "link_base_s",
    }
)


def _check_positive(where: str, key: str, value: float) -> None:
    bound = "a finite number >= 0" if key in _MAY_BE_ZERO else "a finite number > 0"
    if not math.isfinite(value) or value < 0 or (value == 0 and key not in _MAY_BE_ZERO):
        raise ConfigError(f"{where}.{key}: must be {bound}, not {value}")
    if key.endswith("_ratio") and value > 1:
        raise ConfigError(f"{where}.{key}: must be at most 1, not {value}")


@dataclass(frozen=True, slots=True)
class Profile:
    """Coefficients of one engine: times in seconds, sizes in tokens and bytes; all finite, and >= 0 or > 0."""

    name: str
    prefill_base_s: float
    """What every prefill step costs, however short."""
    prefill_floor_s: float
    """The least a step computes beyond its base: reading the weights once."""
    prefill_s_per_token: float
    prefill_s_per_square_token: float
    """Attention: multiplies (end**2 - start**2) of the computed span of positions."""
    decode_base_s: float
    """What every decode step costs, the read of the weights included."""
    decode_s_per_sequence: float
    decode_s_per_kv_token: float
    kv_bytes_per_token: float
    kv_capacity_tokens: int
    prefix_cache_tokens: int
    link_base_s: float
    link_bytes_per_s: float
    """Out of one node; concurrent hand-offs share it."""
    chunk_tokens: int | None = None
    """Token budget of one prefill step; None: a prompt is computed in one step whatever its length."""

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name != "name" and value is not None:
                _check_positive(self.name, entry.name, value)
        if self.prefill_base_s + self.prefill_floor_s + self.prefill_s_per_token <= 0 or self.decode_s(1, 1) <= 0:
            raise ConfigError(f"{self.name}: a prefill and a decode step must take longer than nothing")

    def prefill_s(self, new_tokens: int, cached_tokens: int) -> float:
        """Seconds of one prefill step that computes `new_tokens` >= 1 after `cached_tokens` >= 0 already computed."""
        end = cached_tokens + new_tokens
        work_s = self.prefill_s_per_token * new_tokens
        work_s += self.prefill_s_per_square_token * (end * end - cached_tokens * cached_tokens)
        return self.prefill_base_s + max(work_s, self.prefill_floor_s)

    def whole_prefill_s(self, prompt_tokens: int, cached_tokens: int) -> float:
        """Seconds of a whole prefill in steps of the chunk budget; 0 <= cached_tokens, at least one token is computed.

        The floor is taken over the sum instead of step by step, which keeps the result monotone in both arguments and
        is short by at most one floor when full chunks are above it.
        """
        cached = min(cached_tokens, prompt_tokens - 1)
        new_tokens = prompt_tokens - cached
        steps = 1 if self.chunk_tokens is None else -(-new_tokens // self.chunk_tokens)
        work_s = self.prefill_s_per_token * new_tokens
        work_s += self.prefill_s_per_square_token * (prompt_tokens * prompt_tokens - cached * cached)
        return steps * self.prefill_base_s + max(work_s, steps * self.prefill_floor_s)

    def decode_s(self, batch: int, kv_tokens: int) -> float:
        """Seconds of one decode step of `batch` >= 1 sequences that hold `kv_tokens` >= 0 between them."""
        return self.decode_base_s + self.decode_s_per_sequence * batch + self.decode_s_per_kv_token * kv_tokens

    def hand_off_s(self, tokens: int) -> float:
        """Seconds to move the KV of `tokens` >= 0 over a link that nobody else uses."""
        return self.link_base_s + tokens * self.kv_bytes_per_token / self.link_bytes_per_s


class Quantity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A number and where it comes from."""

    value: float
    source: str


class _Common(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="form"):
    name: str
    summary: str
    kv_bytes_per_token: Quantity
    kv_capacity_tokens: Quantity
    prefix_cache_tokens: Quantity
    link_base_s: Quantity
    link_bytes_per_s: Quantity
    chunk_tokens: Quantity | None = None


class Roofline(_Common, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="roofline"):
    """Hardware and model, from which the coefficients follow: time = work / (peak x efficiency)."""

    prefill_base_s: Quantity
    prefill_flop_per_token: Quantity
    prefill_flop_per_square_token: Quantity
    peak_flop_per_s: Quantity
    prefill_efficiency_ratio: Quantity
    weight_bytes: Quantity
    peak_memory_bytes_per_s: Quantity
    memory_efficiency_ratio: Quantity
    decode_base_s: Quantity
    decode_s_per_sequence: Quantity

    def profile(self) -> Profile:
        """The coefficients that follow from the stated work and rates."""
        flop_per_s = self.peak_flop_per_s.value * self.prefill_efficiency_ratio.value
        bytes_per_s = self.peak_memory_bytes_per_s.value * self.memory_efficiency_ratio.value
        weights_s = self.weight_bytes.value / bytes_per_s
        return _profile(
            self,
            prefill_base_s=self.prefill_base_s.value,
            prefill_floor_s=weights_s,
            prefill_s_per_token=self.prefill_flop_per_token.value / flop_per_s,
            prefill_s_per_square_token=self.prefill_flop_per_square_token.value / flop_per_s,
            decode_base_s=self.decode_base_s.value + weights_s,
            decode_s_per_sequence=self.decode_s_per_sequence.value,
            decode_s_per_kv_token=self.kv_bytes_per_token.value / bytes_per_s,
        )


class Measured(_Common, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="measured"):
    """Coefficients as a fit to measurements gave them."""

    prefill_base_s: Quantity
    prefill_floor_s: Quantity
    prefill_s_per_token: Quantity
    prefill_s_per_square_token: Quantity
    decode_base_s: Quantity
    decode_s_per_sequence: Quantity
    decode_s_per_kv_token: Quantity

    def profile(self) -> Profile:
        """The stated coefficients."""
        return _profile(
            self,
            prefill_base_s=self.prefill_base_s.value,
            prefill_floor_s=self.prefill_floor_s.value,
            prefill_s_per_token=self.prefill_s_per_token.value,
            prefill_s_per_square_token=self.prefill_s_per_square_token.value,
            decode_base_s=self.decode_base_s.value,
            decode_s_per_sequence=self.decode_s_per_sequence.value,
            decode_s_per_kv_token=self.decode_s_per_kv_token.value,
        )


def _profile(sheet: _Common, **coefficients: float) -> Profile:
    return Profile(
        name=sheet.name,
        kv_bytes_per_token=sheet.kv_bytes_per_token.value,
        kv_capacity_tokens=int(sheet.kv_capacity_tokens.value),
        prefix_cache_tokens=int(sheet.prefix_cache_tokens.value),
        link_base_s=sheet.link_base_s.value,
        link_bytes_per_s=sheet.link_bytes_per_s.value,
        chunk_tokens=None if sheet.chunk_tokens is None else int(sheet.chunk_tokens.value),
        **coefficients,
    )


_FORMS: dict[str, type[Roofline] | type[Measured]] = {"measured": Measured, "roofline": Roofline}


def parse_profile(data: bytes, *, where: str = "profile") -> Profile:
    """The profile that JSON text states. ConfigError names the key at fault and, for an unknown key, the known ones."""
    try:
        raw = msgspec.json.decode(data, type=dict[str, object])
        sheet_type = _FORMS.get(str(raw.get("form")))
        if sheet_type is None:
            raise ConfigError(f"{where}.form: must be one of {', '.join(_FORMS)}, not {raw.get('form')!r}")
        _check_keys(raw, sheet_type, where)
        sheet = msgspec.convert(raw, sheet_type)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: {error}") from error
    _check_quantities(sheet, where)
    return sheet.profile()


def _check_keys(raw: dict[str, object], sheet_type: type[msgspec.Struct], where: str) -> None:
    known = ("form", *sheet_type.__struct_fields__)
    for key in raw:
        if key not in known:
            raise ConfigError(f"{where}.{key}: unknown key; known are {', '.join(known)}")


def _check_quantities(sheet: _Common, where: str) -> None:
    for key in sheet.__struct_fields__:
        quantity = getattr(sheet, key)
        if not isinstance(quantity, Quantity):
            continue
        _check_positive(where, key, quantity.value)
        if not quantity.source.strip():
            raise ConfigError(f"{where}.{key}.source: must say where the number comes from")
        if key in ("kv_capacity_tokens", "prefix_cache_tokens", "chunk_tokens") and quantity.value < 1:
            raise ConfigError(f"{where}.{key}: must be at least 1, not {quantity.value}")


def profile_names() -> list[str]:
    """The names of the profiles that come with the package, sorted."""
    return sorted(path.stem for path in PROFILES_DIR.glob("*.json"))


def load_profile(name_or_path: str) -> Profile:
    """Reads a profile by its name, or from a file when the text has a `/` or ends in `.json`. ConfigError if bad."""
    is_path = "/" in name_or_path or name_or_path.endswith(".json")
    if not is_path and name_or_path not in profile_names():
        raise ConfigError(f"profile: unknown name {name_or_path!r}; known are {', '.join(profile_names())}")
    path = Path(name_or_path) if is_path else PROFILES_DIR / f"{name_or_path}.json"
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"profile: cannot read {path}: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"profile: {path} is over {MAX_FILE_BYTES} bytes")
    return parse_profile(data, where=path.name)


WEAK_PRIOR = Profile(
    name="weak-prior",
    prefill_base_s=0.02,
    prefill_floor_s=0.0,
    prefill_s_per_token=1e-4,
    prefill_s_per_square_token=0.0,
    decode_base_s=0.02,
    decode_s_per_sequence=1e-4,
    decode_s_per_kv_token=3e-8,
    kv_bytes_per_token=131_072,
    kv_capacity_tokens=400_000,
    prefix_cache_tokens=400_000,
    link_base_s=0.005,
    link_bytes_per_s=12.5e9,
)
"""What is believed of an engine nobody measured: the order of magnitude of one accelerator with an 8B to 70B model.

Linear in uncached tokens, 10,000 tokens/s, 100 Gbit/s between nodes. Only a start for what is learnt from outcomes.
"""
