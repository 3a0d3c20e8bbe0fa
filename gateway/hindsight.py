"""A journal read back: `sluice replay-journal` (what decides otherwise), `sluice explain` (every pair of a decision).

The events of a journal are what really happened. Fed to a scheduler of the same settings they give the same decisions;
fed to one of another policy or rule they give what it would have decided at each instant, knowing what the gateway
knew. There the world answers as far as the journal can tell: a request that this scheduler sends elsewhere takes as
long as it did, and one that was refused then and is sent now takes as long as it is predicted to.
"""

from __future__ import annotations

import argparse
import heapq
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from gateway.config import Config, load
from gateway.core.errors import ConfigError
from gateway.core.events import Event, Finished, Left, PrefillDone
from gateway.core.scheduler import Scheduler
from gateway.core.types import Decision, Dispatch, HandOff, Reject, Request, Wait
from gateway.journal import Step, feed, last_run, plain
from gateway.looks import Look, Looks

UNKNOWN_OUTPUT_TOKENS = 256
"""Output of a request that was never served and states no limit; between the means of the conversation (343) and the
tool&agent trace (182)."""
SHOWN_MISMATCHES = 20


def read_lines(path: str) -> Iterator[bytes]:
    """The lines of a journal, those of the older file before it first. Raises ConfigError."""
    try:
        for part in (Path(f"{path}.1"), Path(path)):
            if part.exists() or part == Path(path):
                with part.open("rb") as file:
                    yield from file
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def settings_of(text: str, flags: argparse.Namespace) -> Config:
    """The settings of the run, with another policy or rule where the flags say so. Raises ConfigError."""
    config = load(text, {})
    if flags.policy is not None:
        config = replace(config, policy=replace(config.policy, name=flags.policy, settings={}))
    if flags.admission is not None:
        config = replace(config, admission=replace(config.admission, rule=flags.admission, rule_settings={}))
    return config


def scheduler_for(config: Config, looks: Looks | None = None) -> Scheduler:
    """The scheduler of `sluice serve` with these settings."""
    from gateway.app import scheduler_of

    return scheduler_of(config, seed=0) if looks is None else scheduler_of(config, seed=0, wrap=looks.around)


# ---- another policy or rule ------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Otherwise:
    """What another scheduler decides, for each attempt that ended in a dispatch or a refusal then."""

    scheduler: Scheduler
    now: dict[tuple[str, int], Decision] = field(default_factory=dict)
    then: dict[tuple[str, int], Decision] = field(default_factory=dict)
    _attempts: dict[str, Request] = field(default_factory=dict)
    _imagined: list[tuple[float, int, Event]] = field(default_factory=list)
    """What happens to requests that were refused then and are sent now."""
    _count: int = 0

    def run(self, steps: Sequence[Step]) -> None:
        """Feeds the steps."""
        sent = {decision.request_id for step in steps for decision in step.decisions if isinstance(decision, Dispatch)}
        for step in steps:
            self._imagine_until(step.at)
            if isinstance(step.asked, Request):
                self._attempts[step.asked.id] = step.asked
            elif isinstance(step.asked, Finished):
                self._end_wait(step.asked.request_id, step.at)
            recorded, decided = feed(step, self.scheduler)
            for decision in recorded:
                self._keep(self.then, decision)
            for decision in decided:
                self._keep(self.now, decision)
                if isinstance(decision, Dispatch) and decision.request_id not in sent:
                    self._imagine(decision, step.at)

    def _keep(self, kept: dict[tuple[str, int], Decision], decision: Decision) -> None:
        attempt = self._attempts[decision.request_id].attempt
        kept[decision.request_id, attempt] = decision

    def _end_wait(self, request_id: str, at: float) -> None:
        """It ended while it waits here: nobody will send it any more."""
        request = self._attempts.get(request_id)
        if request is not None and isinstance(self.now.get((request_id, request.attempt)), Wait):
            self.scheduler.apply(Left(request_id), now=at)

    def _imagine(self, dispatch: Dispatch, at: float) -> None:
        """It goes as predicted."""
        estimate = dispatch.estimate
        tokens = self._attempts[dispatch.request_id].max_output_tokens or UNKNOWN_OUTPUT_TOKENS
        prefilled_at = at + estimate.wait_s + estimate.fetch_s + estimate.prefill_s
        ended_at = at + estimate.ttft_s + tokens * estimate.tbt_s
        for when, event in (
            (prefilled_at, PrefillDone(dispatch.request_id)),
            (ended_at, Finished(dispatch.request_id)),
        ):
            self._count += 1
            heapq.heappush(self._imagined, (when, self._count, event))

    def _imagine_until(self, at: float) -> None:
        while self._imagined and self._imagined[0][0] <= at:
            when, _, event = heapq.heappop(self._imagined)
            self.scheduler.apply(event, now=when)


def kind_of(decision: Decision | None) -> str:
    """A decision in a word or two."""
    match decision:
        case Dispatch():
            return "sent"
        case Reject(_, reason):
            return f"refused ({reason})"
        case Wait():
            return "waits"
        case HandOff():
            return "decodes"
        case None:
            return "not decided"


def compared(otherwise: Otherwise) -> dict[str, Any]:
    """How often both decide alike, and each pair of kinds in which they differ, most frequent first."""
    changes: Counter[str] = Counter()
    alike = 0
    for name, then in otherwise.then.items():
        now = otherwise.now.get(name)
        is_same_pair = isinstance(then, Dispatch) and isinstance(now, Dispatch) and pair(then) == pair(now)
        if is_same_pair or (not isinstance(then, Dispatch) and kind_of(then) == kind_of(now)):
            alike += 1
        elif isinstance(then, Dispatch) and isinstance(now, Dispatch):
            changes["sent -> sent elsewhere"] += 1
        else:
            changes[f"{kind_of(then)} -> {kind_of(now)}"] += 1
    return {"decisions": len(otherwise.then), "alike": alike, "changes": dict(changes.most_common())}


def pair(dispatch: Dispatch) -> tuple[str, str]:
    """The ids of its engines."""
    return dispatch.estimate.prefill, dispatch.estimate.decode


# ---- commands --------------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """Writes it to standard output."""
    sys.stdout.write(f"{text}\n")


def replay_journal(words: Sequence[str]) -> int:
    """Feeds a journal back; returns 1 when the same settings decide otherwise, else 0. Raises ConfigError."""
    parser = argparse.ArgumentParser(prog="sluice replay-journal", description="Feed the last run of a journal back.")
    parser.add_argument("file", metavar="FILE", help="as written by `sluice serve --journal FILE`")
    parser.add_argument("--policy", metavar="NAME", help="what this policy would have decided")
    parser.add_argument("--admission", metavar="NAME", help="what this rule would have decided")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    flags = parser.parse_args(words)
    text, steps = last_run(read_lines(flags.file))
    scheduler = scheduler_for(settings_of(text, flags))
    if flags.policy is None and flags.admission is None:
        return _check(scheduler, steps, is_json=flags.json)
    otherwise = Otherwise(scheduler)
    otherwise.run(steps)
    figures = compared(otherwise)
    say(json.dumps(figures) if flags.json else "\n".join(_compared_lines(figures)))
    return 0


def _check(scheduler: Scheduler, steps: Sequence[Step], *, is_json: bool) -> int:
    differing = []
    count = 0
    for step in steps:
        recorded, replayed = feed(step, scheduler)
        count += len(recorded)
        if recorded != replayed:
            differing.append({"line": step.line_number, "recorded": plain(recorded), "replayed": plain(replayed)})
    if is_json:
        say(json.dumps({"decisions": count, "differing": differing}))
    else:
        say(f"{count} decisions, {len(differing)} lines decide otherwise now")
        for each in differing[:SHOWN_MISMATCHES]:
            say(f"line {each['line']}\n  then {each['recorded']}\n  now  {each['replayed']}")
    return 1 if differing else 0


def _compared_lines(figures: dict[str, Any]) -> list[str]:
    rows = [f"{count:>8}  {change}" for change, count in figures["changes"].items()]
    return [f"{figures['decisions']} decisions, {figures['alike']} alike", *rows]


def explain(words: Sequence[str]) -> int:
    """Prints one decision with every pair it looked at; returns 0. Raises ConfigError."""
    parser = argparse.ArgumentParser(prog="sluice explain", description="One decision with every pair it looked at.")
    parser.add_argument("request_id", metavar="REQUEST_ID", help="as the gateway's log names it")
    parser.add_argument("--journal", metavar="FILE", required=True, help="as written by `sluice serve --journal FILE`")
    parser.add_argument("--policy", metavar="NAME", help="what this policy would have decided")
    parser.add_argument("--admission", metavar="NAME", help="what this rule would have decided")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    flags = parser.parse_args(words)
    text, steps = last_run(read_lines(flags.journal))
    looks = Looks(flags.request_id)
    scheduler = scheduler_for(settings_of(text, flags), looks)
    decided = decisions_of(flags.request_id, steps, scheduler)
    if not decided:
        raise ConfigError(f"{flags.journal}: the last run knows no request {flags.request_id}")
    at, decision = decided[-1]
    look = looks.last
    described = describe(at, decision, look, request_of(flags.request_id, steps))
    say(json.dumps(described) if flags.json else "\n".join(_explained_lines(described, look)))
    return 0


def decisions_of(request_id: str, steps: Sequence[Step], scheduler: Scheduler) -> list[tuple[float, Decision]]:
    """Feeds the steps up to the request's last decision; what was decided for it, and when."""
    last = max(
        (row for row, step in enumerate(steps) if any(d.request_id == request_id for d in step.decisions)), default=-1
    )
    decided: list[tuple[float, Decision]] = []
    for step in steps[: last + 1]:
        _, replayed = feed(step, scheduler)
        decided += [(step.at, decision) for decision in replayed if decision.request_id == request_id]
    return decided


def request_of(request_id: str, steps: Sequence[Step]) -> Request:
    """The request as it was last asked about."""
    asked = [step.asked for step in steps if isinstance(step.asked, Request) and step.asked.id == request_id]
    return asked[-1]


def describe(at: float, decision: Decision, look: Look | None, request: Request) -> dict[str, Any]:
    """The decision as JSON-able data: the request, what was decided, and every pair by its rank."""
    facts = plain(request)
    assert isinstance(facts, dict)
    facts["block_hashes"] = {size: len(hashes) for size, hashes in request.block_hashes.items()}
    return {
        "request": facts,
        "decided_after_s": at - request.arrived_at,
        "decision": plain(decision),
        "pairs": [] if look is None else look.rows(),
    }


def _explained_lines(described: dict[str, Any], look: Look | None) -> list[str]:
    request, decision = described["request"], described["decision"]
    slo = ", ".join(f"{name} {value:g}" for name, value in request["slo"].items() if isinstance(value, float))
    lines = [
        f"request   {request['id']}, {request['prompt_tokens']} prompt tokens, tenant {request['tenant']}, class "
        f"{request['priority']}, attempt {request['attempt']}; bounds: {slo or 'none'}",
        f"decided   {decision['type'].lower()} after {described['decided_after_s']:.4f} s",
    ]
    if decision["type"] == "Reject":
        lines.append(
            f"refused   {decision['reason']}: {decision['message']}; come back in {decision['retry_after_s']} s"
        )
    return [*lines, "", *(look.table() if look is not None else ["no pair was looked at: none had room"])]
