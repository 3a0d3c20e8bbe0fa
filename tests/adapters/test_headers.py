from __future__ import annotations

import pytest

from adapters.headers import HOP_BY_HOP, PROMISES, ROUTING, client_request_id, forwarded


@pytest.mark.parametrize(
    "name", [*sorted(HOP_BY_HOP | ROUTING | PROMISES), "Host", "Content-Length", "Accept-Encoding"]
)
def test_internal_and_hop_by_hop_headers_stay_here(name):
    assert forwarded([(name.title(), "x"), (name.upper(), "x")]) == ()


def test_what_connection_names_stays_here():
    headers = [("Connection", "close, X-Odd"), ("x-odd", "1"), ("X-Even", "2"), ("connection", "other"), ("Other", "3")]
    assert forwarded(headers) == (("X-Even", "2"),)


def test_end_to_end_headers_pass_in_order():
    headers = (("Authorization", "Bearer k"), ("X-Session-ID", "s"), ("traceparent", "00-ab"))
    assert forwarded(headers) == headers


@pytest.mark.parametrize("value", ["abc", "a:b/c=d", "x" * 128])
def test_a_safe_request_id_is_the_client_s(value):
    assert client_request_id([("x-request-id", value)]) == value


@pytest.mark.parametrize("value", ["", "a,b", "a\nb", "a b", "x" * 129, "\x7f", "é"])
def test_an_unsafe_request_id_is_nobody_s(value):
    assert client_request_id([("X-Request-Id", value)]) is None
