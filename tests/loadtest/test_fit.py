"""`sluice fit`: the profile that it finds is that of the emulated engine it measured."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from gateway.cli import main
from gateway.core.types import Role
from loadtest.engine_types import EngineSettings
from loadtest.fake_engine import FakeCluster, FakeEngine, FakeSettings
from loadtest.probe import Probe, ProbeFailed
from loadtest.step_times import LinearStepTimes
from loadtest.sweep import overlapping_gaps_s
from predictors.measurements import DecodeStep, HandOff, Measurements, Prefill
from predictors.profile import Profile, load_profile

TIMES = LinearStepTimes(fixed_s=0.006, token_s=4e-5, pair_s=4e-9, request_s=1e-3, kv_token_s=1e-6)
"""Slow enough for HTTP on a busy machine to be a small part of what is measured."""
TOLERANCE, HTTP_S = 0.25, 0.01
"""Of the truth, and in all: HTTP and whatever else runs on the machine are in what the client sees."""
SECONDS = "12"
MEASURED = Measurements(
    tuple(Prefill(length, 0, TIMES.prefill_s(length, 0)) for length in range(100, 5000, 200)),
    tuple(DecodeStep(b, b * kv, TIMES.decode_s(b, b * kv)) for b in (1, 2, 4, 8) for kv in (100, 900, 3000)),
    tuple(HandOff(length, 0.05 + 1e-5 * length) for length in range(100, 5000, 200)),
)


async def sluice(*words: str) -> int:
    """The exit code of `sluice`, run beside the emulated engines that it talks to."""
    return await asyncio.to_thread(main, words)


@pytest.fixture
async def pair() -> AsyncIterator[tuple[FakeEngine, FakeEngine]]:
    """A prefill and a decode engine of known step times."""
    async with FakeCluster() as cluster:
        engines = [
            await cluster.start(
                FakeSettings(engine=EngineSettings(role=role, max_run_steps=1, max_model_tokens=4096), times=TIMES)
            )
            for role in (Role.PREFILL, Role.DECODE)
        ]
        yield engines[0], engines[1]


def largest_error(profile: Profile) -> float:
    """The largest relative error of the profile's predictions beyond HTTP_S, over prefills and steps."""
    both = [(profile.whole_prefill_s(n, c), TIMES.prefill_s(n - c, c)) for n, c in [(1000, 0), (2000, 0), (2400, 1600)]]
    both += [(profile.decode_s(b, kv), TIMES.decode_s(b, kv)) for b, kv in [(1, 200), (2, 4000), (4, 8000)]]
    return max(max(0.0, abs(predicted - true) - HTTP_S) / true for predicted, true in both)


@pytest.mark.slow
async def test_a_sweep_finds_the_step_times_of_the_engine_it_measures(
    pair: tuple[FakeEngine, FakeEngine], tmp_path: Path
) -> None:
    out, kept = tmp_path / "found.json", tmp_path / "kept.jsonl"
    files = ("--out", str(out), "--keep-measurements", str(kept))
    sizes = ("--seconds", SECONDS, "--max-batch", "4", "--max-prompt-tokens", "2400")
    assert await sluice("fit", "--engine", pair[0].url, *sizes, *files) == 0
    assert largest_error(load_profile(str(out))) < TOLERANCE
    assert main(["fit", "--measurements", str(kept), "--out", str(out)]) == 0
    assert largest_error(load_profile(str(out))) < TOLERANCE


async def test_a_hand_off_is_timed_from_the_decode_call_to_its_first_token(pair: tuple[FakeEngine, FakeEngine]) -> None:
    async with aiohttp.ClientSession() as http:
        prefill, decode = Probe(http, pair[0].url, role=Role.PREFILL), Probe(http, pair[1].url, role=Role.DECODE)
        elapsed_s = await prefill.hand_off_s(decode, "emulated", [1] * 2000)
        assert TIMES.decode_s(1, 2000) < elapsed_s < TIMES.prefill_s(2000, 0)
        assert (await decode.report()).running_count == 0


async def test_engines_without_a_connector_offer_no_hand_off() -> None:
    async with FakeCluster() as cluster, aiohttp.ClientSession() as http:
        fake = await cluster.start(FakeSettings(has_connector=False))
        prefill, decode = (Probe(http, fake.url, role=role) for role in (Role.PREFILL, Role.DECODE))
        with pytest.raises(ProbeFailed, match="offers no hand-off"):
            await prefill.hand_off_s(decode, "emulated", [1] * 200)


def test_measurements_of_a_file_become_the_profile_they_came_from(tmp_path: Path) -> None:
    (tmp_path / "measured.jsonl").write_bytes(MEASURED.lines())
    out = tmp_path / "found.json"
    assert main(["fit", "--measurements", str(tmp_path / "measured.jsonl"), "--name", "mine", "--out", str(out)]) == 0
    assert "median error" in json.loads(out.read_text())["link_base_s"]["source"]
    profile = load_profile(str(out))
    assert profile.name == "mine"
    assert largest_error(profile) < 0.01
    assert profile.link_base_s == pytest.approx(0.05 - TIMES.decode_s(1, 0), rel=0.05)


async def test_an_engine_that_serves_others_is_left_alone(
    pair: tuple[FakeEngine, FakeEngine], capsys: pytest.CaptureFixture[str]
) -> None:
    async with aiohttp.ClientSession() as http:
        body = {"prompt": [1] * 100, "max_tokens": 3000, "ignore_eos": True, "stream": True}
        async with http.post(pair[0].url + "/v1/completions", json=body) as response:
            await response.content.readany()
            assert await sluice("fit", "--engine", pair[0].url) == 1
    errors = capsys.readouterr().err
    assert errors.startswith(f"sluice: both engine {pair[0].url} is serving 1 requests")
    assert errors.count("\n") == 1


async def test_a_model_that_is_not_served_is_named_with_those_that_are(
    pair: tuple[FakeEngine, FakeEngine], capsys: pytest.CaptureFixture[str]
) -> None:
    assert await sluice("fit", "--engine", pair[0].url, "--model", "other") == 2
    errors = capsys.readouterr().err
    assert errors == f"sluice: model: both engine {pair[0].url} does not serve 'other'; it serves emulated\n"


@pytest.mark.parametrize(
    ("path", "answer", "complaint"),
    [
        ("/v1/models", web.Response(status=401, text="no\nkey"), "answered 401: no key"),
        ("/v1/models", web.Response(text="<html>"), "The model list is not sound"),
        ("/metrics", web.Response(text="up 1\n"), "The metrics lack vllm:num_requests_running"),
        ("/v1/completions", web.Response(status=400, text='{"error": "no"}'), 'answered 400: {"error": "no"}'),
        (
            "/v1/completions",
            web.Response(text='data: {"error": "gone"}\n\n', content_type="text/event-stream"),
            "broke a stream off",
        ),
        ("/v1/completions", web.Response(text="{}"), "answered a stream with"),
    ],
)
async def test_an_engine_that_answers_otherwise_ends_it_with_one_line(
    path: str, answer: web.Response, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = {
        "/v1/models": b'{"data": [{"id": "m", "max_model_len": 4096}]}',
        "/metrics": b"vllm:num_requests_running 0\nvllm:num_requests_waiting 0\n",
        "/v1/completions": b"{}",
    }

    async def serve(request: web.BaseRequest) -> web.Response:
        if request.path == path:
            return web.Response(status=answer.status, body=answer.body, headers=answer.headers)
        return web.Response(body=answers[request.path])

    runner = web.ServerRunner(web.Server(serve))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        assert await sluice("fit", "--engine", f"http://127.0.0.1:{runner.addresses[0][1]}") == 1
    finally:
        await runner.cleanup()
    errors = capsys.readouterr().err
    assert complaint in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "code", "complaint"),
    [
        (["--engine", "http://127.0.0.1:9"], 1, "sluice: both engine http://127.0.0.1:9/v1/models: Cannot connect"),
        (["--measurements", "/none.jsonl"], 2, "sluice: /none.jsonl: cannot be read: No such file"),
        (["--measurements", "/dev/null"], 2, "sluice: prefill: 0 measurements; at least 12 are needed"),
        (["--measurements", "/dev/null", "--name", "../up"], 2, "sluice: --name: must be letters"),
        (["--measurements", "/dev/null", "--decode-engine", "http://a"], 2, "go with --engine"),
    ],
)
def test_what_the_user_got_wrong_is_one_line(
    words: list[str], code: int, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *words]) == code
    errors = capsys.readouterr().err
    assert complaint in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize("words", [[], ["--engine", "ftp://a"], ["--engine", "http://a", "--seconds", "0"]])
def test_flags_that_say_nothing_sound_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["fit", *words])
    assert "usage: sluice fit" in capsys.readouterr().err


def test_only_the_gaps_while_all_streams_run_count() -> None:
    assert overlapping_gaps_s([[0.0, 1.0, 2.0, 5.0], [1.0, 1.5, 1.5, 4.0]]) == [1.0, 0.5, 2.5]
    assert overlapping_gaps_s([[0.0, 1.0], [2.0, 3.0]]) == []
    assert overlapping_gaps_s([[0.0, 1.0], []]) == []
