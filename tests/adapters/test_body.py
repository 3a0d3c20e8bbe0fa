from __future__ import annotations

import pytest

from adapters.body import INTERNAL_FIELDS, MAX_DEPTH, decode, strip
from gateway.core.errors import BadRequest


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "ends within a value"),
        (b'{"a":', "byte 5"),
        (b'{"a":1,}', "byte"),
        (b"[1]", "must be a JSON object"),
        (b"7", "must be a JSON object"),
        (b'{"a":NaN}', "byte 5"),
        (b'{"a":1e999}', "out of range"),
        (b'{"a":' + b"9" * 5000 + b"}", "out of range"),
        (b'{"a":"\x00"}', "byte 6"),
        (b"\x00", "byte 0"),
        (b'{"a":"\xff"}', "UTF-8 (byte 6)"),
        (b'{"a":"\\ud800"}', "surrogate"),
        (b'{"a":1} x', "trailing"),
        (b'{"a":' * 99_999, "nested too deep"),
        (b'{"a":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", "nested too deep"),
    ],
)
def test_a_broken_body_is_refused_with_what_and_where(raw, message):
    with pytest.raises(BadRequest) as caught:
        decode(raw)
    assert message in caught.value.message


def test_many_brackets_are_not_depth():
    assert len(decode(b'{"a":[' + b"[[1]]," * 999 + b'"[[["]}')["a"]) == 1000


def test_depth_up_to_the_limit_is_served():
    assert decode(b'{"a":' + b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1) + b"}")


def test_of_a_duplicate_key_the_last_value_counts():
    assert decode(b'{"a":1,"a":2}') == {"a": 2}


@pytest.mark.parametrize("name", [*sorted(INTERNAL_FIELDS), "bootstrap_room", "bootstrap_host"])
def test_internal_fields_are_stripped_also_from_extra_arguments(name):
    body = {name: 1, "vllm_xargs": {name: 1, "mine": 2}, "user": "u"}
    strip(body, strips_cache_salt=False)
    assert body == {"vllm_xargs": {"mine": 2}, "user": "u"}


def test_the_cache_salt_is_the_client_s_unless_configured():
    body = {"cache_salt": "s"}
    strip(body, strips_cache_salt=False)
    assert body == {"cache_salt": "s"}
    strip(body, strips_cache_salt=True)
    assert body == {}
