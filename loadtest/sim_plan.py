"""What a simulation is asked to do, and what it came to. Plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gateway.core.admission import AdmissionLimits
from gateway.core.errors import ConfigError
from gateway.core.interfaces import Admission, Lengths, Margins, Policy, Predictor
from gateway.core.types import Slo
from loadtest.fault_plan import Fault
from loadtest.flight import Flight
from loadtest.sim_engines import Fleet
from loadtest.sim_returns import Returning
from loadtest.workload import TraceRequest
from predictors.calibration import Calibration
from predictors.output_length import OutputLengths

UNLIMITED = AdmissionLimits(max_in_flight_per_engine=1_000_000, max_waiting=1_000_000, max_wait_s=1e6)
"""The published baselines send whatever comes; engines queue it."""
REPORT_INTERVAL_S = 0.5
"""The live gateway's default, gateway/config.py: WatchSettings."""


@dataclass(frozen=True, slots=True)
class Plan:
    """All settings of a run but its workload."""

    fleet: Fleet
    policy: Policy
    predictor: Predictor
    admission: Admission
    slo: Slo = field(default_factory=Slo)
    seed: int = 0
    limits: AdmissionLimits = UNLIMITED
    lengths: Lengths | None = field(default_factory=OutputLengths)
    margins: Margins | None = field(default_factory=lambda: Calibration(cold_factor=1.0))
    report_interval_s: float = REPORT_INTERVAL_S
    report_delay_s: float = 0.0
    """From an engine's count to the gateway's reading of it."""
    faults: tuple[Fault, ...] = ()
    gateways: int = 1
    """They share the requests in turn."""
    view_delay_s: float | None = 0.0
    """Time until a gateway knows what another one did; None: they never tell each other."""
    tenant_weights: Mapping[str, float] = field(default_factory=dict)
    """Shares of tenants when requests have to wait; 1 for those not named."""
    priorities: Mapping[str, int] = field(default_factory=dict)
    """Class of each tenant's requests; 0 for those not named."""
    returning: Returning | None = None
    """What clients do that are refused; None: they go away."""
    hammerers: tuple[TraceRequest, ...] = ()
    """What each of the clients asks for who ask again and again, beside the workload."""
    sample_interval_s: float = 5.0
    """Between two samples of the load."""

    def __post_init__(self) -> None:
        if self.gateways < 1 or self.report_interval_s <= 0 or min(self.report_delay_s, self.view_delay_s or 0.0) < 0:
            raise ConfigError("simulation: needs a gateway, reports at an interval above 0 and delays of 0 or more")
        for fault in self.faults:
            if fault.engine_id not in self.fleet.engine_ids:
                known = ", ".join(self.fleet.engine_ids)
                raise ConfigError(f"fault: there is no engine {fault.engine_id!r}; there are {known}")


@dataclass(frozen=True, slots=True)
class LoadSample:
    """How busy both stages were at an instant, by the first gateway's ledger."""

    at_s: float
    prefill_work_s: float
    """Mean seconds of prefill ahead of a new arrival, over engines that prefill."""
    decoding_count: float
    """Mean requests producing tokens, over engines that decode."""
    in_flight_count: int
    """Requests that have come and not ended, in the gateway or at an engine."""


@dataclass(slots=True)
class Run:
    """What a simulation came to."""

    plan: Plan
    flights: list[Flight] = field(default_factory=list)
    """The last request of each client, in the order in which the clients came."""
    visits: list[Flight] = field(default_factory=list)
    """All requests of these clients in order of arrival; empty when nobody comes back."""
    samples: list[LoadSample] = field(default_factory=list)
    duration_s: float = 0.0
    prefill_busy_ratio: float | None = None
    decode_busy_ratio: float | None = None

    def came(self, flight: Flight) -> None:
        """A client asks, for the first time or again; those beside the workload are not counted."""
        visit = flight.visit
        if visit.is_hammering:
            return
        if visit.number > 1:
            self.flights[visit.client] = flight
        else:
            self.flights.append(flight)
        if self.plan.returning is not None:
            self.visits.append(flight)
