from __future__ import annotations

from gateway.core.types import Engine, Role
from predictors.analytic import Analytic
from predictors.profile import load_profile

A800, H800 = load_profile("llama3-70b-8xa800"), load_profile("llama3-70b-8xh800")
OLD = Engine(id="old", url="http://old", role=Role.PREFILL)
NEW = Engine(id="new", url="http://new", role=Role.PREFILL)
DECODE = Engine(id="d", url="http://d", role=Role.DECODE)


def test_predictions_are_the_profile_s_own_times() -> None:
    estimator = Analytic(A800).start()
    assert estimator.prefill_s(OLD, prompt_tokens=20_000, cached_tokens=4096) == A800.whole_prefill_s(20_000, 4096)
    assert estimator.decode_step_s(DECODE, batch=7, kv_tokens=70_000) == A800.decode_s(7, 70_000)


def test_an_engine_with_a_profile_of_its_own_is_predicted_from_it() -> None:
    estimator = Analytic(A800, profiles_by_engine={"new": H800}).start()
    assert estimator.prefill_s(NEW, prompt_tokens=9000, cached_tokens=0) == H800.whole_prefill_s(9000, 0)
    assert estimator.prefill_s(OLD, prompt_tokens=9000, cached_tokens=0) == A800.whole_prefill_s(9000, 0)


def test_a_hand_off_takes_the_link_of_the_prefill_engine() -> None:
    times = Analytic(A800, profiles_by_engine={"new": load_profile("llama3-8b-1xh100")}).start()
    old_s, new_s = times.hand_off_s([OLD, NEW], [DECODE], prompt_tokens=1000)[:, 0]
    assert old_s == A800.hand_off_s(1000)
    assert new_s == load_profile("llama3-8b-1xh100").hand_off_s(1000)
