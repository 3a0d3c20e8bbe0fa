from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
from itertools import islice
from pathlib import Path

import pytest

from gateway.core.types import Role
from loadtest import demo
from loadtest.demo import Pool, main, trickle

ROOT = Path(__file__).parents[2]
WITHIN_S = 40.0
POOL = Pool(("http://127.0.0.1:1",), ("http://127.0.0.1:2",), "m", longest_prompt_words=20)


async def run(*words: str) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    command = (sys.executable, "-m", "gateway", "demo", *words)
    return await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe, cwd=ROOT)


@pytest.mark.slow
async def test_it_ends_after_its_seconds_with_a_summary_and_0():
    process = await run("--seconds", "2", "--port", "0", "--json")
    out, said = await asyncio.wait_for(process.communicate(), WITHIN_S)
    assert process.returncode == 0, said.decode()
    summary = json.loads(out)
    assert summary["requests"] >= 1
    assert summary["errors"] == 0
    assert b"Sluice is listening on http://127.0.0.1:" in said
    assert b"Traceback" not in said


@pytest.mark.slow
async def test_ctrl_c_ends_it_with_a_summary_and_0_and_a_busy_port_is_no_obstacle():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = await run("--port", str(port))
        async with asyncio.timeout(WITHIN_S):
            said = await process.stderr.readuntil(b"Ctrl-C ends it")
        process.send_signal(signal.SIGINT)
        out, rest = await asyncio.wait_for(process.communicate(), WITHIN_S)
    assert process.returncode == 0, rest.decode()
    assert f"port {port} is taken, another one is used".encode() in said
    assert b"TTFT" in out
    assert b"Traceback" not in rest


async def test_the_emulated_pool_has_two_engines_of_each_role():
    async with demo.emulated_pool() as pool:
        assert (len(pool.prefill_urls), len(pool.decode_urls)) == (2, 2)
        async with demo.gateway_at(pool, 0) as gateway:
            await demo.ready(gateway, engines=4)
            states = gateway.driver.scheduler.cluster.engines.values()
            assert sorted(state.engine.role for state in states) == [Role.DECODE] * 2 + [Role.PREFILL] * 2
            assert "in flight" in demo.status_line(gateway, demo.Progress(), elapsed_s=3.0)


def test_the_load_is_the_same_for_the_same_seed_and_comes_in_order():
    first, again, other = (list(islice(trickle(POOL, seed=seed), 50)) for seed in (1, 1, 2))
    assert first == again != other
    assert [request.due_s for request in first] == sorted(request.due_s for request in first)


def test_some_prompts_share_a_long_beginning():
    prompts = [json.loads(request.body)["messages"][0]["content"] for request in islice(trickle(POOL, seed=1), 50)]
    beginnings = [prompt[:40] for prompt in prompts]
    assert max(map(beginnings.count, beginnings)) >= 5


@pytest.mark.parametrize("words", [["--port", "70000"], ["--seconds", "0"], ["--seconds", "nan"], ["--seconds", "inf"]])
def test_impossible_flags_are_refused(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert words[0] in capsys.readouterr().err
