from __future__ import annotations

from dataclasses import replace

import pytest

from adapters.pools import pool_fault, refuse_mixed_pools
from adapters.vllm import Vllm
from gateway.core.errors import ConfigError
from tests.adapters.transcripts import B, D, P

ADAPTERS = {"vllm": Vllm(), "other": Vllm()}


def with_connectors(prefill, decode):
    return replace(P, connector=prefill), replace(D, connector=decode)


@pytest.mark.parametrize("connectors", [("nixl", "NixlConnector"), ("store", "ExampleConnector")])
def test_engines_of_one_connector_share_a_pool_by_whichever_name(connectors):
    refuse_mixed_pools(with_connectors(*connectors), ADAPTERS)


def test_a_mixed_pool_is_refused_with_both_engines_and_their_connectors():
    with pytest.raises(ConfigError, match=r"engines\[1\] \(d\): vllm with connector store, but p of .* nixl"):
        refuse_mixed_pools(with_connectors("nixl", "store"), ADAPTERS)


def test_two_kinds_of_engine_cannot_share_a_pool():
    assert "neither can read" in str(pool_fault(replace(D, adapter="other"), [P], ADAPTERS))


def test_pools_of_their_own_may_differ():
    prefill, decode = with_connectors("nixl", "store")
    refuse_mixed_pools([prefill, replace(decode, pool="another")], ADAPTERS)


def test_an_engine_that_does_both_hands_nothing_on_and_may_have_any_connector():
    refuse_mixed_pools([P, D, replace(B, connector="unheard-of")], ADAPTERS)


def test_an_unknown_connector_or_adapter_is_a_fault():
    assert "unheard-of" in str(pool_fault(replace(P, connector="unheard-of"), [], ADAPTERS))
    assert "no adapter" in str(pool_fault(replace(P, adapter="unheard-of"), [], ADAPTERS))
