"""Predictions against outcomes: the workload, the journal's words, the table, and a whole run on emulated engines."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from gateway.core.errors import GatewayError
from gateway.core.types import Role
from loadtest.engine_types import EngineSettings
from loadtest.fake_engine import FakeCluster, FakeSettings
from loadtest.reality import PREFIX_TOKENS, Run, Told, noise_floor, read_journal, replay_once, requests, table, workload

TOLD = Told(
    prompt_tokens=10,
    predicted_prefill_s=0.3,
    predicted_hand_off_s=0.1,
    predicted_tbt_s=0.02,
    before_s=0.0,
    prefill_s=0.4,
    hand_off_s=0.1,
    tbt_s=0.02,
)


def prompts(seed: int) -> list[list[int]]:
    return [json.loads(request.body)["prompt"] for request in requests(workload(80, 2.0, 1), "m", random.Random(seed))]


def test_the_workload_is_the_same_for_the_same_seed_and_keeps_its_rate() -> None:
    items = workload(2000, 4.0, 1)
    assert items == workload(2000, 4.0, 1)
    assert items != workload(2000, 4.0, 2)
    assert items[-1].due_s == pytest.approx(500, rel=0.15)


def test_requests_come_in_bursts_and_no_two_are_of_one_length() -> None:
    items = workload(400, 4.0, 1)
    assert len({item.prompt_tokens for item in items}) == 400
    assert any(one.due_s == other.due_s for one, other in pairwise(items))


def test_another_seed_gives_other_tokens_of_the_same_shape() -> None:
    one, other = prompts(1), prompts(2)
    assert [len(prompt) for prompt in one] == [len(prompt) for prompt in other]
    assert all(a != b for a, b in zip(one, other, strict=True))
    shared = [number for number, item in enumerate(workload(80, 2.0, 1)) if item.prefix == 0]
    assert len({tuple(one[number][:PREFIX_TOKENS]) for number in shared}) == 1


def journal_lines(**finished: object) -> list[bytes]:
    estimate = {"wait_s": 0.1, "fetch_s": 0.0, "prefill_s": 0.2, "hand_off_s": 0.04, "join_s": 0.01, "tbt_s": 0.02}
    dispatch = {"type": "Dispatch", "request_id": "a", "attempt": 1, "estimate": estimate}
    request = {"prompt_tokens": 10, "arrived_at": 1.0}
    events = [("PrefillDone", 1.5, {}), ("FirstToken", 1.6, {}), ("Finished", 2.0, {"tbt_s": 0.03, **finished})]
    rows: list[object] = [{"at": 1.1, "do": "decide", "request": request, "decision": dispatch}]
    rows += [{"at": at, "do": "apply", "event": {"type": name, "request_id": "a", **more}} for name, at, more in events]
    return [json.dumps(row).encode() for row in rows]


def test_the_journal_tells_what_was_predicted_and_what_came_of_it() -> None:
    (told,) = read_journal([b'{"at":0,"do":"apply","event":{"type":"EngineLost","engine_id":"x"}}', *journal_lines()])
    assert told.predicted_ttft_s == pytest.approx(0.35)
    assert told.ttft_s == pytest.approx(0.6)
    assert (told.before_s, told.prefill_s, told.hand_off_s) == pytest.approx((0.1, 0.4, 0.1))
    assert (told.predicted_tbt_s, told.tbt_s) == (0.02, 0.03)


def test_requests_without_an_end_or_without_gaps_are_left_out() -> None:
    assert read_journal(journal_lines()[:-1]) == []
    assert read_journal(journal_lines(tbt_s=None)) == []


def test_the_noise_floor_compares_the_same_request_with_itself() -> None:
    other = [replace(TOLD, prompt_tokens=11, prefill_s=9.0), replace(TOLD, prefill_s=0.5)]
    assert noise_floor([TOLD], other) == pytest.approx(
        {"TTFT": 0.2, "  wait and prefill": 0.25, "  hand-off and join": 0.0, "TBT": 0.0}
    )


def test_the_table_shows_each_error_beside_the_noise_floor() -> None:
    printed = table([[TOLD, TOLD], [TOLD, replace(TOLD, prefill_s=0.5)]], skip=1)
    assert re.search(r"replay 1: requests 2 to 2\n.*\nTTFT +0\.500 s +20\.0% +20\.0% +-20\.0% +20\.0%\n", printed)
    assert re.search(r"replay 2.*\n.*\nTTFT +0\.600 s +33\.3%", printed)


@pytest.mark.slow
async def test_a_replay_on_emulated_engines_is_told_whole(tmp_path: Path) -> None:
    async with FakeCluster() as cluster:
        prefill, decode = [
            await cluster.start(FakeSettings(engine=EngineSettings(role=role, max_run_steps=1)))
            for role in (Role.PREFILL, Role.DECODE)
        ]
        run = Run(prefill.url, decode.url, "llama3-8b-1xh100", "emulated", request_count=40, rate_per_s=15)
        told = await replay_once(run, 1, tmp_path)
        assert len(told) > 20  # an answer that comes all at once, on a busy machine, has no gaps to tell of
        assert {each.prompt_tokens for each in told} <= {item.prompt_tokens for item in workload(40, 15, 1)}
        assert all(each.predicted_ttft_s > 0 and each.ttft_s > 0 for each in told)
        with pytest.raises(GatewayError, match="40 requests failed, the first: http_status"):
            await replay_once(replace(run, model="other"), 2, tmp_path)
