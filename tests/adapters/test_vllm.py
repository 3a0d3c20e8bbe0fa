from __future__ import annotations

from dataclasses import replace

import pytest

from adapters.vllm import Vllm
from adapters.vllm.in_turn import InTurn
from adapters.vllm.single import Single
from gateway.core.errors import ConfigError
from tests.adapters.transcripts import B, D, P, payload


def test_two_engines_hand_off_and_one_engine_serves_alone():
    assert isinstance(Vllm().open(payload(), P, D), InTurn)
    assert isinstance(Vllm().open(payload(), B, B), Single)


def test_the_lease_is_a_setting():
    exchange = Vllm(lease_s=3.0).open(payload(), P, D)
    assert isinstance(exchange, InTurn)
    assert exchange.hand_over.lease_s == 3.0


def test_connectors_that_cannot_hand_off_are_refused():
    with pytest.raises(ConfigError, match="nixl"):
        Vllm().open(payload(), replace(P, connector="other"), replace(D, connector="other"))
    with pytest.raises(ConfigError, match=r"d \(mooncake\)"):
        Vllm().open(payload(), P, replace(D, connector="mooncake"))
