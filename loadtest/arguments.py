"""Values of command-line flags, checked while they are parsed: functions for argparse's `type`."""

from __future__ import annotations

import argparse
import math
from urllib.parse import urlsplit


def positive(text: str) -> float:
    """A number above 0 and finite."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0 and finite, got {text}")
    return value


def positive_int(text: str) -> int:
    """A whole number, at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def url(text: str) -> str:
    """An HTTP address with a host, as it came."""
    try:
        parts = urlsplit(text)
        is_sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_sound = False
    if not is_sound:
        raise argparse.ArgumentTypeError(f"must be like http://host:port, got {text!r}")
    return text


def header(text: str) -> tuple[str, str]:
    """The name and value of `NAME:VALUE`."""
    name, separator, value = text.partition(":")
    if not separator or not name.strip():
        raise argparse.ArgumentTypeError(f"must be NAME:VALUE, got {text!r}")
    return name.strip(), value.strip()
