"""Would a refused request have met its bounds? The rest of the run again, with that one request let in.

A run is repeated (it is the same to the last bit), and at each sampled refusal the process forks: the child lets the
request in and goes on until it has ended, the parent waits for the verdict and goes on as before. So a sample costs the
simulation of one request's life, not of the whole trace. A request that meets its bounds may cost others theirs; the
child also tells who else ended meanwhile, and whether within their bounds.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from gateway.core.interfaces import Admission, Arrival, Gate, Patience, PrefillEnd, Refusal
from gateway.core.types import Dispatch, HandOff, Reject
from loadtest.flight import Flight
from loadtest.report import Status, is_attained
from loadtest.sim_plan import Plan, Run
from loadtest.sim_report import outcome_of
from loadtest.simulator import Simulation
from loadtest.workload import TraceRequest

LIFE_S = 600.0
"""Virtual time after which a request that was let in counts as missed: longer than any answer of the traces takes."""


@dataclass(frozen=True, slots=True)
class LettingIn:
    """An admission rule that lets these requests in whatever it thinks."""

    admission: Admission
    let_in: set[str]

    def start(self) -> Gate:
        return _Gate(self.admission.start(), self.let_in)


@dataclass(frozen=True, slots=True)
class _Gate:
    gate: Gate
    let_in: set[str]

    def arrive(self, arrival: Arrival, *, now: float) -> NDArray[np.bool_] | Refusal | Patience | None:
        return None if arrival.request.id in self.let_in else self.gate.arrive(arrival, now=now)

    def end_prefill(self, prefill: PrefillEnd, *, now: float) -> Refusal | Patience | None:
        return None if prefill.request.id in self.let_in else self.gate.end_prefill(prefill, now=now)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.gate, name)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of one request that was let in."""

    request_id: str
    has_met: bool
    others: dict[str, bool]
    """Requests that ended meanwhile -> within their bounds."""


@dataclass(slots=True)
class _Child:
    """A forked run: which request it let in, and where to tell of it."""

    flight: Flight
    pipe: int
    first_open: int
    """How many requests had come when it was let in."""
    open_before: set[str]
    """Those that had come before and not ended."""


class Forking(Simulation):
    """A run that forks at sampled refusals."""

    def __init__(self, plan: Plan, workload: Iterable[TraceRequest], sampled: set[str], *, until_s: float) -> None:
        """Refusals after `until_s` on the `time.perf_counter` clock are not looked at any more."""
        self.verdicts: list[Verdict] = []
        self._sampled = sampled
        self._until_s = until_s
        self._let_in: set[str] = set()
        self._child: _Child | None = None
        super().__init__(replace(plan, admission=LettingIn(plan.admission, self._let_in)), workload)

    def run(self) -> Run:
        """The run's figures; in a child there is no coming back."""
        try:
            while not self.is_over:
                now = self.step()
                if self._child is not None:
                    self._judge(self._child, now)
            if self._child is not None:
                self._judge(self._child, float("inf"))
        except BaseException:
            if self._child is not None:
                os._exit(1)
            raise
        return self.finish()

    def _decided(self, gateway: int, decision: Dispatch | Reject | HandOff, now: float) -> None:
        flight = self._in_flight[decision.request_id]
        is_sample = isinstance(decision, Reject) and flight.request.id in self._sampled and flight.dispatch is None
        if is_sample and self._child is None and time.perf_counter() < self._until_s and self._fork(flight):
            self._gateways[gateway].decide(flight.request, now=now)
            return
        super()._decided(gateway, decision, now)

    def _fork(self, flight: Flight) -> bool:
        """True in the child, which lets the request in; the parent has its verdict by then."""
        reader, writer = os.pipe()
        process_id = os.fork()
        if process_id == 0:
            os.close(reader)
            self._let_in.add(flight.request.id)
            self._child = _Child(flight, writer, len(self._run.flights), set(self._in_flight))
            return True
        os.close(writer)
        with os.fdopen(reader, "rb") as told:
            said = told.read()
        os.waitpid(process_id, 0)
        if said:
            self.verdicts.append(msgspec.json.decode(said, type=Verdict))
        return False

    def _judge(self, child: _Child, now: float) -> None:
        """Ends the child when its request has ended, or can no longer."""
        flight = child.flight
        if flight.outcome is None and now < flight.request.arrived_at + LIFE_S:
            return
        slo = self._plan.slo
        has_met = flight.outcome is not None and is_attained(flight.outcome, slo)
        candidates = (
            other
            for number, other in enumerate(self._run.flights)
            if number >= child.first_open or other.request.id in child.open_before
        )
        others = {
            other.request.id: is_attained(other.outcome, slo)
            for other in candidates
            if other.outcome is not None and other is not flight
        }
        with os.fdopen(child.pipe, "wb") as pipe:
            pipe.write(msgspec.json.encode(Verdict(flight.request.id, has_met, others)))
        os._exit(0)


def counterfactuals(
    plan: Plan, workload_of: Callable[[], Iterable[TraceRequest]], run: Run, *, samples: int, max_s: float
) -> dict[str, Any]:
    """How many of the run's refused requests would have met their bounds, over at most `samples` drawn ones.

    `workload_of` gives the workload of the run once more. Refused after the prefill are left out: their prefill cannot
    be undone. After `max_s` seconds of real time no more are looked at; ratios are of those that were, None of none.
    """
    refused = [
        flight.request.id
        for flight in run.flights
        if outcome_of(flight).status is Status.REFUSED and not flight.is_refused_after_prefill
    ]
    drawn = random.Random(f"counterfactual {plan.seed}").sample(refused, min(samples, len(refused)))
    workload = list(workload_of())  # a file read lazily has one offset, which parent and child would both move
    again = Forking(plan, workload, set(drawn), until_s=time.perf_counter() + max_s)
    again.run()
    verdicts = again.verdicts
    attained = {flight.request.id: is_attained(outcome_of(flight), plan.slo) for flight in run.flights}
    met = [verdict for verdict in verdicts if verdict.has_met]
    free = [verdict for verdict in met if lost(verdict, attained) <= 0]
    return {
        "refused": len(refused),
        "samples": len(verdicts),
        "refused_but_would_have_met_ratio": len(met) / len(verdicts) if verdicts else None,
        "refused_but_would_have_met_at_nobody_s_cost_ratio": len(free) / len(verdicts) if verdicts else None,
    }


def lost(verdict: Verdict, attained: dict[str, bool]) -> int:
    """How many fewer of the others met their bounds because one more was let in, of those that had ended."""
    return sum(attained[name] for name in verdict.others) - sum(verdict.others.values())
