from __future__ import annotations

import math

import numpy as np
import pytest

from gateway.core.errors import ConfigError
from gateway.core.types import Engine, Role
from predictors.polynomial import Polynomial, decode_terms, prefill_terms

ENGINE = Engine(id="p", url="http://p", role=Role.PREFILL)


def test_prefill_time_is_the_polynomial_worked_by_hand() -> None:
    polynomial = Polynomial(prefill=(0.01, 1e-3, 1e-6, 1e-7))
    # 0.01 + 1e-3 x 600 + 1e-6 x (1000^2 - 400^2) + 1e-7 x 600^2 = 0.01 + 0.6 + 0.84 + 0.036
    assert polynomial.prefill_s(ENGINE, prompt_tokens=1000, cached_tokens=400) == pytest.approx(1.486)


def test_step_time_is_the_line_worked_by_hand() -> None:
    polynomial = Polynomial(decode=(0.01, 1e-3, 1e-6))
    assert polynomial.decode_step_s(ENGINE, batch=8, kv_tokens=5000) == pytest.approx(0.01 + 0.008 + 0.005)


def test_terms_are_what_the_coefficients_multiply() -> None:
    assert prefill_terms(np.array([10.0]), np.array([4.0])).tolist() == [[1.0, 6.0, 84.0, 36.0]]
    assert decode_terms(np.array([3.0]), np.array([70.0])).tolist() == [[1.0, 3.0, 70.0]]


@pytest.mark.parametrize(
    "settings",
    [
        {"prefill": (0.1, -1e-9, 0.0, 0.0)},
        {"prefill": (0.0, 0.0, 0.0, 0.0)},
        {"decode": (0.1, math.nan, 0.0)},
        {"hand_off": (0.1, math.inf)},
        {"decode": (0.1, 0.1)},
    ],
)
def test_coefficients_that_could_shrink_with_work_are_refused(settings: dict[str, tuple[float, ...]]) -> None:
    with pytest.raises(ConfigError, match="polynomial"):
        Polynomial(**settings)  # type: ignore[arg-type]
