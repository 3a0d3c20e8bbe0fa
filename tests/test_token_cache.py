"""The cache of token ids: bounded, least recently used first out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.token_cache import ENTRY_BYTES, TokenCache, text_key


def ids(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.int32)


def test_what_was_put_is_got_back_under_its_text_only() -> None:
    cache = TokenCache(limit_bytes=10_000)
    cache.put(text_key("a"), ids(3))
    found = cache.get(text_key("a"))
    assert found is not None
    assert found.tolist() == [0, 1, 2]
    assert cache.get(text_key("b")) is None


def test_the_least_recently_used_goes_first() -> None:
    cache = TokenCache(limit_bytes=2 * (ENTRY_BYTES + 40))
    for text in ("a", "b"):
        cache.put(text_key(text), ids(10))
    cache.get(text_key("a"))
    cache.put(text_key("c"), ids(10))
    assert [cache.get(text_key(text)) is not None for text in "abc"] == [True, False, True]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 200)), max_size=60), st.integers(0, 3000))
def test_it_never_holds_more_than_its_limit(puts: list[tuple[int, int]], limit: int) -> None:
    cache = TokenCache(limit_bytes=limit)
    for name, count in puts:
        cache.put(text_key(str(name)), ids(count))
        assert 0 <= cache.used_bytes <= limit


def test_a_lone_surrogate_has_no_key() -> None:
    with pytest.raises(UnicodeEncodeError):
        text_key("\ud800")
