from __future__ import annotations

import json
from pathlib import Path

import pytest

from gateway.core.errors import ConfigError
from predictors.profile import PROFILES_DIR, Profile, load_profile, parse_profile, profile_names

REFERENCE = "llama3-70b-8xa800-reference"


def reference_with(**changes: object) -> bytes:
    sheet = json.loads((PROFILES_DIR / f"{REFERENCE}.json").read_text())
    return json.dumps(sheet | changes).encode()


def test_reference_prefill_of_8192_tokens_takes_what_its_constants_give_by_hand() -> None:
    # 140e9 x 8192 = 1.146880e15; 1,310,720 x 8192^2 = 8.796093e13; sum / 1.248e15 = 0.98945587 s; + 20 ms.
    assert load_profile(REFERENCE).prefill_s(8192, 0) == pytest.approx(1.00945587, abs=1e-8)


def test_reference_prefill_of_cached_tokens_pays_their_attention_only() -> None:
    # 140e9 x 2048 = 2.867200e14; 1,310,720 x (8192^2 - 6144^2) = 3.848291e13; sum / 1.248e15 = 0.26057925; + 20 ms.
    assert load_profile(REFERENCE).prefill_s(2048, 6144) == pytest.approx(0.28057925, abs=1e-8)


def test_reference_prefill_takes_at_least_the_read_of_the_weights() -> None:
    # 140e9 B / 11.2e12 B/s = 12.5 ms; + 20 ms.
    assert load_profile(REFERENCE).prefill_s(1, 0) == pytest.approx(0.0325)


def test_reference_decode_step_of_32_requests_takes_what_its_constants_give_by_hand() -> None:
    # 4 ms + 12.5 ms + 32 x 10,000 x 327,680 / 11.2e12 = 9.362286 ms + 32 x 50 us = 1.6 ms.
    assert load_profile(REFERENCE).decode_s(32, 320_000) == pytest.approx(0.027462286, abs=1e-9)


def test_reference_hand_off_moves_320_kib_per_token_at_100_gb_per_s() -> None:
    assert load_profile(REFERENCE).hand_off_s(10_000) == pytest.approx(10_000 * 327_680 / 100e9)


def test_reference_capacities_are_those_of_the_reference_simulation() -> None:
    profile = load_profile(REFERENCE)
    assert (profile.kv_capacity_tokens, profile.prefix_cache_tokens) == (1_400_000, 3_000_000)
    assert profile.chunk_tokens is None


@pytest.mark.parametrize(("name", "break_even_bytes_per_s"), [("8xa800", 6e9), ("8xh800", 19e9)])
def test_at_peak_rate_fetching_8192_tokens_breaks_even_where_mooncake_says(
    name: str, break_even_bytes_per_s: float
) -> None:
    sheet = json.loads((PROFILES_DIR / f"llama3-70b-{name}.json").read_text())
    sheet["prefill_efficiency_ratio"]["value"] = 1.0
    profile = parse_profile(json.dumps(sheet).encode())
    compute_s = profile.prefill_s(8192, 0) - profile.prefill_base_s
    assert 8192 * profile.kv_bytes_per_token / compute_s == pytest.approx(break_even_bytes_per_s, rel=0.15)


@pytest.mark.parametrize("name", profile_names())
def test_every_number_of_a_profile_names_its_source_and_the_file_its_profile(name: str) -> None:
    sheet = json.loads((PROFILES_DIR / f"{name}.json").read_text())
    numbers = [value for value in sheet.values() if isinstance(value, dict)]
    assert all(len(number["source"]) > 10 for number in numbers)
    assert load_profile(name).name == name


def test_a_whole_prefill_pays_the_base_of_every_chunk() -> None:
    profile = load_profile("llama3-8b-1xh100")
    assert profile.chunk_tokens == 8192
    steps_s = [profile.prefill_s(8192, 0), profile.prefill_s(8192, 8192), profile.prefill_s(1000, 16_384)]
    assert profile.whole_prefill_s(17_384, 0) == pytest.approx(sum(steps_s))


def test_a_fully_cached_prompt_still_computes_one_token() -> None:
    profile = load_profile(REFERENCE)
    assert profile.whole_prefill_s(5000, 5000) == profile.prefill_s(1, 4999)


def test_unknown_key_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"profile\.batch_size: unknown key; known are form, .*weight_bytes"):
        parse_profile(reference_with(batch_size={"value": 1, "source": "x"}))


@pytest.mark.parametrize("value", [0, -1.5, 1.1])
def test_an_impossible_number_is_refused_by_its_key(value: float) -> None:
    with pytest.raises(ConfigError, match="prefill_efficiency_ratio"):
        parse_profile(reference_with(prefill_efficiency_ratio={"value": value, "source": "here"}))


@pytest.mark.parametrize(
    "changes",
    [
        {"form": "guess"},
        {"name": 3},
        {"weight_bytes": 140e9},
        {"weight_bytes": {"value": "many", "source": "here"}},
        {"weight_bytes": {"value": 140e9}},
        {"weight_bytes": {"value": 140e9, "source": " "}},
        {"weight_bytes": {"value": 140e9, "source": "here", "note": "x"}},
        {"kv_capacity_tokens": {"value": 0.5, "source": "here"}},
    ],
)
def test_a_malformed_profile_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        parse_profile(reference_with(**changes))


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b'{"form": "roofline"}', b"\xff\xfe", b"NaN"])
def test_what_is_no_profile_at_all_is_refused(data: bytes) -> None:
    with pytest.raises(ConfigError):
        parse_profile(data)


def test_a_number_beyond_all_bounds_is_refused() -> None:
    text = reference_with(weight_bytes={"value": 1, "source": "here"}).replace(b'"value": 1,', b'"value": 1e999,')
    with pytest.raises(ConfigError):
        parse_profile(text)


def test_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="llama3-8b-1xh100"):
        load_profile("llama3-9b")


def test_a_profile_is_read_from_a_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_bytes(reference_with(name="mine"))
    assert load_profile(str(path)).name == "mine"


def test_a_missing_file_and_a_huge_one_are_config_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_profile(str(tmp_path / "none.json"))
    (tmp_path / "huge.json").write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(ConfigError, match="over"):
        load_profile(str(tmp_path / "huge.json"))


def test_a_profile_whose_steps_take_no_time_is_refused() -> None:
    with pytest.raises(ConfigError, match="longer than nothing"):
        Profile("free", 0, 0, 1e-4, 0, 0, 0, 0, 1, 1, 1, 0, 1)
