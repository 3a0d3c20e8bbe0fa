"""What counts as the same answer of two engines: the order of each choice's events, not how choices interleave."""

from __future__ import annotations

import json

from tests.engines.shapes import stream_shape


def stream(*events: tuple[int, str | None]) -> bytes:
    """A stream of (choice, finish reason), with the engine's fingerprint where a choice ends, and the end mark."""
    lines = []
    for index, reason in events:
        event: dict[str, object] = {"choices": [{"index": index, "text": "a", "finish_reason": reason}]}
        lines.append(json.dumps(event if reason is None else event | {"system_fingerprint": "v"}))
    return "".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"]).encode()


def test_two_choices_may_end_together_or_one_after_the_other():
    together = stream((0, None), (1, None), (0, "stop"), (1, "stop"))
    apart = stream((0, None), (0, "stop"), (1, None), (1, None), (1, "stop"))
    assert stream_shape(together) == stream_shape(apart)


def test_a_choice_that_never_ends_is_seen():
    whole = stream((0, None), (1, None), (0, "stop"), (1, "stop"))
    assert stream_shape(whole) != stream_shape(stream((0, None), (1, None), (0, "stop")))


def test_the_order_within_a_single_choice_counts():
    assert stream_shape(stream((0, None), (0, "stop"))) != stream_shape(stream((0, "stop"), (0, None)))
