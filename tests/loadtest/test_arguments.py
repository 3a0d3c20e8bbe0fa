from __future__ import annotations

import argparse
from collections.abc import Callable

import pytest

from loadtest.arguments import header, positive, positive_int, url


def test_sound_values_come_back_as_what_they_are() -> None:
    assert positive("0.5") == 0.5
    assert positive_int("3") == 3
    assert url("http://127.0.0.1:8000/base") == "http://127.0.0.1:8000/base"
    assert header("authorization: Bearer a:b") == ("authorization", "Bearer a:b")


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        *((positive, text) for text in ("0", "-1", "inf", "nan")),
        *((positive_int, text) for text in ("0", "-1")),
        *((url, text) for text in ("", "host:80", "ftp://host", "http://", "http://host:99999", "http://[::1")),
        *((header, text) for text in ("", "name", ":value", " : value")),
    ],
)
def test_unsound_values_are_refused(parse: Callable[[str], object], text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="must be"):
        parse(text)
