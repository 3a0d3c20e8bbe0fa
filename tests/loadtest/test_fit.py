"""`sluice fit`: the profile that it finds is that of the emulated engine it measured."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
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
from loadtest.sweep import Sweep, SweepLimits, Swept, overlapping_gaps_s
from predictors.measurements import DecodeStep, HandOff, Measurements, Prefill
from predictors.profile import load_profile
from tests.loadtest.virtual_loop import VirtualLoop

TIMES = LinearStepTimes(fixed_s=0.006, token_s=4e-5, pair_s=4e-9, request_s=1e-3, kv_token_s=1e-6)
TOLERANCE = 0.05
"""Of the truth, which the engine model rounds where prompts and steps meet."""
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


async def swept_pair() -> Swept:
    """What a sweep finds on two emulated engines within 30 s of their time."""
    async with FakeCluster() as cluster, aiohttp.ClientSession() as http:
        prefill, decode = [
            Probe(http, (await cluster.start(FakeSettings(engine=settings, times=TIMES))).url, role=settings.role)
            for settings in (EngineSettings(role=role, max_run_steps=1) for role in (Role.PREFILL, Role.DECODE))
        ]
        limits = SweepLimits(seconds=30, max_prompt_tokens=4000)
        return await Sweep(prefill, decode, limits, random.Random(1), lambda ratio, what: None).run()


@pytest.mark.slow
def test_a_sweep_finds_the_step_times_of_the_engines_it_measures(tmp_path: Path) -> None:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        swept = runner.run(swept_pair())
    kept, out = tmp_path / "kept.jsonl", tmp_path / "found.json"
    kept.write_bytes(swept.measurements.lines())
    assert main(["fit", "--measurements", str(kept), "--out", str(out)]) == 0
    profile = load_profile(str(out))
    for tokens, cached in [(500, 0), (2000, 0), (4000, 0), (4000, 2000), (3000, 2800)]:
        true_s = TIMES.prefill_s(tokens - cached, cached)
        assert profile.whole_prefill_s(tokens, cached) == pytest.approx(true_s, TOLERANCE)
    for batch, kv_tokens in [(1, 200), (2, 4000), (4, 8000), (8, 20_000)]:
        assert profile.decode_s(batch, kv_tokens) == pytest.approx(TIMES.decode_s(batch, kv_tokens), TOLERANCE)
    assert {prefill.cached_tokens > 0 for prefill in swept.measurements.prefills} == {False, True}
    assert len(swept.measurements.hand_offs) > 12


async def test_a_hand_off_is_timed_from_the_decode_call_to_its_first_token(pair: tuple[FakeEngine, FakeEngine]) -> None:
    async with aiohttp.ClientSession() as http:
        prefill, decode = Probe(http, pair[0].url, role=Role.PREFILL), Probe(http, pair[1].url, role=Role.DECODE)
        elapsed_s = await prefill.hand_off_s(decode, "emulated", [1] * 3900)
        assert TIMES.decode_s(1, 3900) < elapsed_s < TIMES.prefill_s(3900, 0)
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
    assert profile.whole_prefill_s(3500, 0) == pytest.approx(TIMES.prefill_s(3500, 0), rel=0.01)
    assert profile.decode_s(8, 8000) == pytest.approx(TIMES.decode_s(8, 8000), rel=0.01)
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


Answering = Callable[[web.Request], Awaitable[web.Response]]


async def served(answers: Mapping[str, Answering]) -> tuple[str, web.AppRunner]:
    """The URL of an idle engine that answers these paths so, and its runner."""

    async def models(request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "m", "max_model_len": 4096}]})

    async def metrics(request: web.Request) -> web.Response:
        return web.Response(text="vllm:num_requests_running 0\nvllm:num_requests_waiting 0\n")

    async def complete(request: web.Request) -> web.Response:
        return web.json_response({})

    known: dict[str, Answering] = {"/v1/models": models, "/metrics": metrics, "/v1/completions": complete}
    app = web.Application()
    for path, answer in (known | dict(answers)).items():
        app.router.add_route("*", path, answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return f"http://127.0.0.1:{runner.addresses[0][1]}", runner


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
    async def say(request: web.Request) -> web.Response:
        return web.Response(status=answer.status, body=answer.body, headers=answer.headers)

    url, runner = await served({path: say})
    try:
        assert await sluice("fit", "--engine", url) == 1
    finally:
        await runner.cleanup()
    errors = capsys.readouterr().err
    assert complaint in errors
    assert errors.count("\n") == 1


async def test_an_engine_that_fails_under_load_ends_it_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    running = 0

    async def complete(request: web.Request) -> web.Response:
        nonlocal running
        running += 1
        await asyncio.sleep(0.01)
        is_alone, running = running == 1, running - 1
        if not (await request.json())["stream"]:
            return web.json_response({})
        text = 'data: {"choices": []}\n\n' * 2 if is_alone else 'data: {"error": "overrun"}\n\n'
        return web.Response(text=text, content_type="text/event-stream")

    url, runner = await served({"/v1/completions": complete})
    try:
        assert await sluice("fit", "--engine", url, "--seconds", "2") == 1
    finally:
        await runner.cleanup()
    assert capsys.readouterr().err == f'sluice: both engine {url} broke a stream off: {{"error": "overrun"}}\n'


async def test_an_interrupted_sweep_leaves_nothing_behind(pair: tuple[FakeEngine, FakeEngine], tmp_path: Path) -> None:
    words = ("fit", "--engine", pair[0].url, "--out", str(tmp_path / "a"), "--keep-measurements", str(tmp_path / "b"))
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "gateway", *words)
    async with aiohttp.ClientSession() as http:
        probe = Probe(http, pair[0].url, role=Role.BOTH)
        while not (await probe.report()).running_count:
            await asyncio.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.wait(), 20) == 130
        async with asyncio.timeout(5):
            while (await probe.report()).running_count:
                await asyncio.sleep(0.01)
    assert not os.listdir(tmp_path)


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
    assert overlapping_gaps_s([[0.0, 1.0, 2.0, 5.0], [1.0, 1.5, 1.5, 4.0]]) == [1.0, 0.5, 0.0, 2.5]
    assert overlapping_gaps_s([[0.0, 1.0], [2.0, 3.0]]) == []
    assert overlapping_gaps_s([[0.0, 1.0], []]) == []
