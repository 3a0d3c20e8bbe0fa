"""A journal read back from the command line: the same settings decide alike, others tell what they would have done."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from gateway.app import journal_of, scheduler_of
from gateway.cli import main
from gateway.config import Config, JournalSettings, PolicySettings, load
from gateway.core.events import EngineFound, EngineHealth, Event, Finished, FirstToken, PrefillDone
from gateway.core.types import Dispatch, Health, Reject, Slo
from gateway.hindsight import Otherwise, compared
from gateway.journal import last_run
from tests.builders import a_mesh, a_request, a_scheduler

SETTINGS = """
[admission]
max_in_flight_per_engine = 3
max_waiting = 4
max_wait_s = 5.0
[policy]
name = "random"
[[tenants]]
name = "t1"
weight = 2.0
key_hashes = ["{}"]
[[engines]]
url = "http://10.0.0.1:1"
api_key = "hunter2"
"""


def live(path: Path, *, rule: str = "none", ttft_s: float | None = None, requests: int = 60) -> list[Any]:
    """Writes the journal of a random run; every decision in order."""
    config = load(SETTINGS.format("ab" * 32), {})
    config = replace(config, journal=JournalSettings(path=str(path)), admission=replace(config.admission, rule=rule))
    journal, scheduler, rng, now = journal_of(config), scheduler_of(config, seed=0), random.Random(7), 100.0
    decisions: list[Any] = []
    running: list[str] = []

    def apply(event: Event) -> None:
        journal.event(event, now)
        scheduler.apply(event, now=now)

    def wake() -> None:
        woken = scheduler.wake(now=now)
        journal.woke(woken, now)
        decisions.extend(woken)
        running.extend(decision.request_id for decision in woken if isinstance(decision, Dispatch))

    for engine in a_mesh(2, 2):
        apply(EngineFound(engine))
        apply(EngineHealth(engine.id, Health.UP))
    for number in range(requests):
        now += rng.expovariate(3.0)
        request = a_request(
            f"r{number}", arrived_at=now, prompt_tokens=900, tenant=f"t{number % 2}", slo=Slo(ttft_s=ttft_s)
        )
        decision = scheduler.decide(request, now=now)
        journal.decided(request, decision, now)
        decisions.append(decision)
        running.extend([request.id] if isinstance(decision, Dispatch) else [])
        if len(running) > 4:
            done = running.pop(0)
            for event in (PrefillDone(done), FirstToken(done), Finished(done, output_tokens=50, tbt_s=0.1)):
                apply(event)
        if (wake_at := scheduler.next_wakeup()) is not None and wake_at <= now:
            wake()
    journal.close()
    return decisions


def answer(capsys: Any, *words: str, code: int = 0) -> Any:
    assert main(words) == code
    return json.loads(capsys.readouterr().out)


def test_the_settings_of_the_run_stand_in_its_journal_without_a_secret(tmp_path):
    live(tmp_path / "j")
    first = (tmp_path / "j").read_text().splitlines()[0]
    assert json.loads(first)["do"] == "start"
    assert "hunter2" not in first
    assert "abab" not in first
    text, _ = last_run((tmp_path / "j").read_bytes().splitlines())
    assert load(text, {}).tenants[0].weight == 2.0


def test_the_same_settings_decide_alike(tmp_path, capsys):
    decisions = live(tmp_path / "j")
    said = answer(capsys, "replay-journal", str(tmp_path / "j"), "--json")
    assert said == {"decisions": len(decisions), "differing": []}
    assert main(["replay-journal", str(tmp_path / "j")]) == 0
    assert capsys.readouterr().out == f"{len(decisions)} decisions, 0 lines decide otherwise now\n"


def test_a_line_that_was_changed_is_told_with_both_decisions(tmp_path, capsys):
    live(tmp_path / "j")
    path = tmp_path / "j"
    path.write_text(
        re.sub(
            '"estimate":{"type":"Estimate","prefill":"p.',
            '"estimate":{"type":"Estimate","prefill":"p9',
            path.read_text(),
            count=1,
        )
    )
    said = answer(capsys, "replay-journal", str(path), "--json", code=1)
    assert said["differing"][0]["recorded"][0]["estimate"]["prefill"] == "p9"
    assert main(["replay-journal", str(path)]) == 1
    assert f"line {said['differing'][0]['line']}\n  then [{{" in capsys.readouterr().out


def test_another_policy_tells_what_it_would_have_chosen(tmp_path, capsys):
    live(tmp_path / "j")
    said = answer(capsys, "replay-journal", str(tmp_path / "j"), "--policy", "round_robin", "--json")
    assert said["changes"]["sent -> sent elsewhere"] > 0
    assert said["alike"] + sum(said["changes"].values()) == said["decisions"] == 60


def test_another_rule_tells_whom_it_would_have_let_in(tmp_path, capsys):
    decisions = live(tmp_path / "j", rule="ttft", ttft_s=0.2)
    refused = [decision for decision in decisions if isinstance(decision, Reject) and decision.reason == "ttft_slo"]
    assert refused
    said = answer(capsys, "replay-journal", str(tmp_path / "j"), "--admission", "none", "--json")
    assert said["changes"]["refused (ttft_slo) -> sent"] > 0
    assert main(["replay-journal", str(tmp_path / "j"), "--admission", "none"]) == 0
    assert "refused (ttft_slo) -> sent" in capsys.readouterr().out


def test_those_it_would_have_let_in_end_as_predicted_and_hold_nothing_for_ever(tmp_path):
    live(tmp_path / "j", rule="ttft", ttft_s=0.2)
    _, steps = last_run((tmp_path / "j").read_bytes().splitlines())
    otherwise = Otherwise(a_scheduler(max_in_flight_per_engine=3, max_waiting=4, max_wait_s=5.0))
    otherwise.run(steps)
    otherwise._imagine_until(1e9)
    otherwise.scheduler.cluster.check()
    imagined = set(otherwise.scheduler.cluster.reservations)
    then = {name for (name, _), decision in otherwise.then.items() if isinstance(decision, Dispatch)}
    assert imagined <= then
    assert compared(otherwise)["decisions"] == 60


# ---- explain ---------------------------------------------------------------------------------------------------------


def test_a_decision_is_explained_with_every_pair_the_chosen_first(tmp_path, capsys):
    live(tmp_path / "j")
    said = answer(capsys, "explain", "r0", "--journal", str(tmp_path / "j"), "--json")
    assert [(row["prefill"], row["decode"]) for row in said["pairs"]].count(("p1", "d1")) == 1
    assert len(said["pairs"]) == 4
    estimate = said["decision"]["estimate"]
    assert (said["pairs"][0]["prefill"], said["pairs"][0]["decode"]) == (estimate["prefill"], estimate["decode"])
    assert [row["prefill"] for row in said["pairs"][1:]] == [
        runner_up["prefill"] for runner_up in said["decision"]["runners_up"]
    ]
    assert said["request"]["tenant"] == "t0"


def test_a_decision_is_a_table_for_people(tmp_path, capsys):
    live(tmp_path / "j")
    assert main(["explain", "r1", "--journal", str(tmp_path / "j")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("request   r1, 900 prompt tokens, tenant t1")
    assert out[1].startswith("decided   dispatch after")
    assert out[3].split()[:4] == ["rank", "prefill", "decode", "fetch"]
    assert len(out) == 4 + 4


def test_a_refusal_is_explained_with_its_numbers(tmp_path, capsys):
    decisions = live(tmp_path / "j", rule="ttft", ttft_s=0.2)
    refused = next(d for d in decisions if isinstance(d, Reject) and d.reason == "ttft_slo" and d.best is not None)
    said = answer(capsys, "explain", refused.request_id, "--journal", str(tmp_path / "j"), "--json")
    assert said["decision"]["best"]["prefill_s"] == refused.best.prefill_s
    assert said["pairs"]
    assert main(["explain", refused.request_id, "--journal", str(tmp_path / "j")]) == 0
    assert "refused   ttft_slo: the first token is predicted after" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("explain", "nobody", "--journal", "{}/j"), "knows no request nobody"),
        (("explain", "r0", "--journal", "{}/none"), "cannot be read"),
        (("replay-journal", "{}/none"), "cannot be read"),
        (("replay-journal", "{}/j", "--policy", "nonsense"), "policy.name: unknown"),
        (("replay-journal", "{}/j", "--admission", "nonsense"), "admission.name: unknown"),
    ],
)
def test_what_the_user_got_wrong_is_one_line(tmp_path, capsys, words, said):
    live(tmp_path / "j", requests=3)
    assert main([word.format(tmp_path) for word in words]) == 2
    assert said in capsys.readouterr().err


def test_a_run_whose_beginning_went_into_the_older_file_is_read_whole(tmp_path, capsys):
    config = Config(journal=JournalSettings(path=str(tmp_path / "j"), max_bytes=400_000), policy=PolicySettings())
    journal, scheduler = journal_of(config), scheduler_of(config, seed=0)
    number = 0
    while not (tmp_path / "j.1").exists():
        number += 1
        request = a_request(f"r{number}")
        journal.decided(request, scheduler.decide(request, now=0.0), 0.0)
    journal.close()
    assert answer(capsys, "replay-journal", str(tmp_path / "j"), "--json") == {"decisions": number, "differing": []}
