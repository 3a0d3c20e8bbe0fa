"""A trace replayed by Locust at its own instants: Mooncake, Azure or BurstGPT timing, or a generated look-alike.

    locust -f loadtest/locustfile_trace.py --headless --host http://127.0.0.1:8000 --trace FILE --seconds 600
    locust -f loadtest/locustfile_trace.py --headless --processes 2 ...      the same, shared by two processes

`--streams` is how many may be open at once, each a Locust user; the shape begins with all of them and ends the run when
the last answer has ended. Open loop as long as one of them is free; the sender's lag is in the summary. The same
requests as `sluice replay` sends, byte for byte.
"""

from __future__ import annotations

import sys
from functools import cache

import psutil
from locust import LoadTestShape, User, constant, events, task
from locust.env import Environment
from locust.exception import StopUser
from locust.runners import WorkerRunner

from gateway.core.errors import GatewayError
from loadtest.locusts.options import add_trace, options_of, target_of, workload_of
from loadtest.locusts.schedule import Schedule, Share
from loadtest.locusts.session import Session
from loadtest.locusts.stream import Connection
from loadtest.workload import TraceRequest

GRACE_S = 10.0
"""After the last request's own limit, for what workers report every 3 s."""

session = Session(add_trace)


class TraceUser(User):
    """One slot: takes the next request of the process's schedule, waits for its instant, sends it."""

    wait_time = constant(0)

    def on_start(self) -> None:
        assert self.host, "say where the gateway is: --host http://HOST:PORT"
        self._connection = Connection(self.host, timeout_s=options_of(self.environment).timeout_s)

    def on_stop(self) -> None:
        self._connection.close()

    @task
    def send_next(self) -> None:
        """One request, or the end of this user when there are no more."""
        due = schedule_of(self.environment).next()
        if due is None:
            raise StopUser
        request, due_at = due
        session.goodput.add(self._connection.send(request, scheduled_at=due_at), "replay")


class TraceShape(LoadTestShape):
    """All slots at once, until every request has ended."""

    def tick(self) -> tuple[int, float] | None:
        assert self.runner is not None, "Locust sets it before the first tick"
        options = options_of(self.runner.environment)
        workload = workload_in(self.runner.environment)
        if len(session.goodput.outcomes) + session.goodput.dropped_count >= len(workload):
            return None
        if self.get_run_time() > workload[-1].arrival_s + options.timeout_s + GRACE_S:
            return None
        return options.streams, options.streams


@events.init.add_listener
def check_workload(environment: Environment, **_: object) -> None:
    """Ends Locust before it begins when the workload cannot be read; a worker gets its options only later."""
    if isinstance(environment.runner, WorkerRunner):
        return
    try:
        workload_in(environment)
    except GatewayError as error:
        print(f"locust: {error.message}", file=sys.stderr)
        for (
            worker
        ) in psutil.Process().children():  # `--processes` has forked them already, and they would wait for ever
            worker.terminate()
        sys.exit(2)


@cache
def workload_in(environment: Environment) -> list[TraceRequest]:
    """The whole workload, read once per process."""
    return workload_of(options_of(environment))


@cache
def schedule_of(environment: Environment) -> Schedule:
    """This process's part of the replay."""
    options, runner = options_of(environment), environment.runner
    share = Share()
    if isinstance(runner, WorkerRunner):
        share = Share(runner.worker_index, max(1, options.expect_workers))
    return Schedule(workload_in(environment), target_of(options), share)
