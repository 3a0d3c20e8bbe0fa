"""Of those who wait, whom to keep: as many as can be in time.

Moore and Hodgson's rule for one machine: take the jobs in the order of their due times, and whenever one would be late
leave out the largest of those taken so far. Of jobs that are equally important no choice keeps more. The prefill stage
is taken as one machine: a second of one of eight engines counts as an eighth.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Job:
    """One who waits."""

    due_s: float
    """Seconds from now until its work has to be done; +inf: it has time."""
    work_s: float
    """What it takes of the machine, >= 0."""
    size: float
    """The largest is left out first: its work, over what it is worth."""
    priority: int = 0
    """Those of the lowest are left out first."""
    is_expected: bool = False
    """Whether it was refused before and told to come now: of the same priority these are left out last."""


def kept(jobs: Sequence[Job], *, busy_s: float) -> list[bool]:
    """Which of the jobs to keep, when the machine has `busy_s` >= 0 seconds of other work to do first."""
    keep = [True] * len(jobs)
    taken: list[tuple[int, bool, float, int]] = []
    done_s = busy_s
    for number in sorted(range(len(jobs)), key=lambda each: jobs[each].due_s):
        job = jobs[number]
        if busy_s + job.work_s > job.due_s:  # late even alone: nobody else has to go for it
            keep[number] = False
            continue
        done_s += job.work_s
        heapq.heappush(taken, (job.priority, job.is_expected, -job.size, number))
        while taken and done_s > job.due_s:
            dropped = heapq.heappop(taken)[3]
            keep[dropped] = False
            done_s -= jobs[dropped].work_s
    return keep
