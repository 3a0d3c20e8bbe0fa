"""Which of a client's headers an engine may see, and which request ids are safe to echo."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, TypeAlias

Headers: TypeAlias = tuple[tuple[str, str], ...]

# Source: RFC 9110 section 7.6.1, with the older names that still appear.
HOP_BY_HOP: Final = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)

# The body is written anew and answers are read by us, so what describes the client's own bytes must not travel.
OURS: Final = frozenset({"host", "content-length", "content-type", "content-encoding", "accept-encoding", "expect"})

# Source: vllm/entrypoints/serve/engine/serving.py and generate/base/serving.py (0.32.0),
# sglang/srt/entrypoints/http_server.py (0.5.23): each steers the scheduler, the request table or the log of an engine.
ROUTING: Final = frozenset(
    {"x-request-id", "x-data-parallel-rank", "x-vllm-priority", "endpoint-load-metrics-format", "x-smg-routing-key"},
)
ROUTING_PREFIX: Final = "x-override-"

# What a client asks of this gateway; engines neither know it nor should trust it. Milliseconds, and a class.
TTFT: Final = "x-slo-ttft-ms"
TBT: Final = "x-slo-tbt-ms"
TPOT: Final = "x-slo-tpot-ms"
DEADLINE: Final = "x-request-deadline-ms"
PRIORITY: Final = "x-priority"
PROMISES: Final = frozenset({TTFT, TBT, TPOT, DEADLINE, PRIORITY})

_DROPPED: Final = HOP_BY_HOP | OURS | ROUTING | PROMISES

# Visible ASCII without the comma: the NIXL heart-beat joins request ids with commas.
_REQUEST_ID: Final = re.compile(r"[!-+\--~]{1,128}")


def forwarded(headers: Sequence[tuple[str, str]]) -> Headers:
    """The headers an engine may see, in the client's order: no hop-by-hop, no framing, no routing-internal ones."""
    kept = [(name, value) for name, value in headers if not _is_dropped(name.lower())]
    named = _named_in_connection(headers)
    return tuple((name, value) for name, value in kept if name.lower() not in named)


def _is_dropped(name: str) -> bool:
    return name in _DROPPED or name.startswith(ROUTING_PREFIX)


def client_request_id(headers: Sequence[tuple[str, str]]) -> str | None:
    """The id the client gave its request, to be echoed to it; None when absent or unsafe (comma, control, > 128)."""
    for name, value in headers:
        if name.lower() == "x-request-id" and _REQUEST_ID.fullmatch(value):
            return value
    return None


def _named_in_connection(headers: Sequence[tuple[str, str]]) -> set[str]:
    """Lower-case names that a Connection header declares hop-by-hop."""
    values = (value for name, value in headers if name.lower() == "connection")
    return {token.strip().lower() for value in values for token in value.split(",")}
