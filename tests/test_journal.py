from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.core.errors import ConfigError
from gateway.core.events import (
    AttemptFailed,
    BlocksCleared,
    BlocksRemoved,
    BlocksStored,
    EngineFound,
    EngineHealth,
    EngineLost,
    EngineReport,
    Event,
    Finished,
    FirstToken,
    Left,
    PrefillDone,
    Progress,
    Tier,
)
from gateway.core.scheduler import Scheduler
from gateway.core.types import Dispatch, Health, Reject, Report, Request, Slo, Wait
from gateway.journal import FileJournal, Journal, plain, replay
from tests.builders import a_mesh, a_request, a_scheduler, an_engine, an_estimate

HASHES = np.array([1, 2**64 - 1, 2**63], dtype=np.uint64)
EVENTS: list[Event] = [
    EngineFound(an_engine("b7", max_model_tokens=4096)),
    EngineHealth("b7", Health.DOWN, "it said so"),
    EngineReport("b7", Report(3, 4, kv_usage_ratio=0.25, preemptions=1)),
    PrefillDone("r1"),
    FirstToken("r1"),
    Progress("r1", 32),
    Finished("r1", output_tokens=9, prompt_tokens=5, cached_tokens=0, tbt_s=0.1 + 0.2),
    AttemptFailed("r1", None, "lost"),
    Left("r1"),
    BlocksStored("b7", 16, HASHES),
    BlocksRemoved("b7", 16, HASHES[:1], Tier.HOST),
    BlocksCleared("b7"),
    EngineLost("b7"),
]


def written(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def run(journal: Journal, seed: int, steps: int) -> None:
    """A random life of a scheduler, told to the journal."""
    rng, now = random.Random(seed), 100.0
    scheduler = a_scheduler(max_in_flight_per_engine=2, max_waiting=3, max_wait_s=5.0)

    def apply(event: Event) -> None:
        journal.event(event, now)
        scheduler.apply(event, now=now)

    for engine in a_mesh(2, 2, block_tokens=16):
        apply(EngineFound(engine))
        apply(EngineHealth(engine.id, Health.UP))
    for number in range(steps):
        now += rng.expovariate(2.0)
        wake_at = scheduler.next_wakeup()
        if wake_at is not None and wake_at <= now:
            journal.woke(scheduler.wake(now=now), now)
        known = f"r{rng.randrange(number + 1)}"
        engine = rng.choice(["p1", "p2", "d1", "d2"])
        hashes = np.array([rng.randrange(2**64) for _ in range(3)], dtype=np.uint64)
        match rng.randrange(8):
            case 0 | 1 | 2:
                request = a_request(
                    f"r{number}", arrived_at=now, prompt_tokens=rng.randrange(1, 999), block_hashes={16: hashes}
                )
                journal.decided(request, scheduler.decide(request, now=now), now)
            case 3:
                apply(PrefillDone(known))
            case 4:
                apply(Finished(known, tbt_s=rng.random()))
            case 5:
                apply(EngineReport(engine, Report(rng.randrange(4), 0)))
            case 6:
                apply(EngineHealth(engine, rng.choice([Health.UP, Health.DOWN])))
            case 7:
                apply(BlocksStored(engine, 16, hashes))


def a_twin() -> Scheduler:
    return a_scheduler(max_in_flight_per_engine=2, max_waiting=3, max_wait_s=5.0)


@dataclass
class Ear:
    """What a scheduler would hear."""

    heard: list[tuple[float, Event]]

    def apply(self, event: Event, *, now: float) -> None:
        self.heard.append((now, event))


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_comes_back_as_it_was(event, tmp_path):
    journal = FileJournal(tmp_path / "j", max_bytes=2**20)
    journal.event(event, 1.5)
    journal.close()
    ear = Ear([])
    assert replay(written(tmp_path / "j"), ear) == []
    assert plain(ear.heard) == plain([(1.5, event)])
    assert isinstance(getattr(ear.heard[0][1], "hashes", HASHES), np.ndarray)


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32))
def test_a_run_fed_back_gives_the_same_decisions(seed, tmp_path_factory):
    path = tmp_path_factory.mktemp("journal") / "j"
    journal = FileJournal(path, max_bytes=2**24)
    run(journal, seed, steps=60)
    journal.close()
    assert replay(written(path), a_twin()) == []


def test_a_scheduler_of_other_settings_is_told_apart_line_by_line(tmp_path):
    journal = FileJournal(tmp_path / "j", max_bytes=2**24)
    run(journal, 1, steps=200)
    journal.close()
    lines = written(tmp_path / "j")
    mismatches = replay(lines, a_scheduler(max_in_flight_per_engine=2, max_waiting=0))
    assert mismatches
    first = mismatches[0]
    assert json.loads(lines[first.line_number - 1])["do"] in ("decide", "wake")
    assert first.recorded != first.replayed


def test_only_the_last_run_of_a_file_is_fed_back(tmp_path):
    for seed in (1, 2):
        journal = FileJournal(tmp_path / "j", max_bytes=2**24)
        run(journal, seed, steps=50)
        journal.close()
    assert replay(written(tmp_path / "j"), a_twin()) == []


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([b'{"do": "apply", "at": 1, "event": {}}'], "the beginning of the run is missing"),
        ([b'{"do": "start"}', b"{"], "line 2 is not sound"),
        ([b'{"do": "start"}', b'{"do": "dance"}'], "line 2 does nothing known"),
        ([b'{"do": "start"}', b'{"do": "apply", "at": 1, "event": {"type": "X"}}'], "line 2 is not sound: 'X'"),
        ([b'{"do": "start"}', b'{"do": "apply", "at": 1, "event": {"type": "Left"}}'], "line 2 is not sound"),
        ([], "the beginning of the run is missing"),
    ],
)
def test_what_is_no_journal_is_refused_with_the_line(lines, said):
    with pytest.raises(ConfigError, match=said):
        replay(lines, a_scheduler())


def test_every_line_says_when_and_what(tmp_path):
    journal = FileJournal(tmp_path / "j", max_bytes=2**20)
    request = a_request(block_hashes={16: HASHES}, slo=Slo(ttft_s=1.0))
    for decision in (Dispatch("r1", 1, an_estimate(), (an_estimate("p2"),)), Wait("r1", "engines_full", 9.0)):
        journal.decided(request, decision, 1.0)
    journal.woke([Reject("r1", "queue_full", "no", retry_after_s=1.0, best=an_estimate())], 2.0)
    journal.close()
    start, *lines = map(json.loads, written(tmp_path / "j"))
    assert start == {"do": "start"}
    assert [(line["at"], line["do"]) for line in lines] == [(1.0, "decide"), (1.0, "decide"), (2.0, "wake")]
    assert lines[0]["request"]["block_hashes"] == {"16": HASHES.tolist()}
    assert lines[2]["decisions"][0]["type"] == "Reject"


def test_a_request_keeps_its_hashes_as_an_array(tmp_path):
    journal = FileJournal(tmp_path / "j", max_bytes=2**20)
    scheduler = a_scheduler(an_engine("b1"))
    request = a_request(block_hashes={16: HASHES})
    journal.event(EngineFound(an_engine("b1")), 0.0)
    journal.event(EngineHealth("b1", Health.UP), 0.0)
    journal.decided(request, scheduler.decide(request, now=0.0), 0.0)
    journal.close()
    twin = a_scheduler()
    assert replay(written(tmp_path / "j"), twin) == []
    kept: Request = twin.cluster.reservations["r1"].request
    assert kept.block_hashes[16].dtype == np.uint64
    assert kept.block_hashes[16].tolist() == HASHES.tolist()


@pytest.mark.parametrize("max_bytes", [4096, 100_000])
def test_both_files_together_stay_within_the_bound(tmp_path, max_bytes):
    path = tmp_path / "j"
    journal = FileJournal(path, max_bytes=max_bytes)
    for number in range(3000):
        journal.event(Progress(f"r{number}", number), float(number))
    journal.close()
    older = tmp_path / "j.1"
    assert max_bytes / 4 < path.stat().st_size + older.stat().st_size <= max_bytes
    told = [json.loads(line)["event"]["output_tokens"] for line in written(older) + written(path)]
    assert told == list(range(3000 - len(told), 3000))


def test_a_disk_that_fails_ends_the_journal_and_not_the_gateway(tmp_path):
    """Rotation needs the directory, which is gone."""
    path = tmp_path / "d" / "j"
    path.parent.mkdir()
    journal = FileJournal(path, max_bytes=4096)
    with structlog.testing.capture_logs() as lines:
        journal.event(Left("r"), 0.0)
        for file in path.parent.iterdir():
            file.unlink()
        path.parent.rmdir()
        for number in range(1000):
            journal.event(Left(f"r{number}"), 1.0)
        journal.close()
    assert [line["event"] for line in lines] == ["the journal ends here"]


def test_the_journal_that_writes_nowhere_takes_everything():
    run(Journal(), 1, steps=20)
    Journal().close()
