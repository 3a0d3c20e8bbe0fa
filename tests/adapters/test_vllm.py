from __future__ import annotations

from dataclasses import replace

import pytest

from adapters.vllm import Vllm
from adapters.vllm.nixl_pull import NixlPull
from adapters.vllm.single import Single
from gateway.core.errors import ConfigError
from tests.adapters.transcripts import B, D, P, payload


def test_two_engines_hand_off_and_one_engine_serves_alone():
    assert isinstance(Vllm().open(payload(), P, D), NixlPull)
    assert isinstance(Vllm().open(payload(), B, B), Single)


def test_the_lease_is_a_setting():
    exchange = Vllm(lease_s=3.0).open(payload(), P, D)
    assert isinstance(exchange, NixlPull)
    assert exchange.lease_s == 3.0


def test_connectors_that_cannot_hand_off_are_refused():
    with pytest.raises(ConfigError, match="nixl"):
        Vllm().open(payload(), replace(P, connector="mooncake"), replace(D, connector="mooncake"))
    with pytest.raises(ConfigError, match="d \\(other\\)"):
        Vllm().open(payload(), P, replace(D, connector="other"))
