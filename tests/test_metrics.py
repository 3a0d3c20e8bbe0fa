from __future__ import annotations

import asyncio
import math
import shutil
from asyncio.subprocess import PIPE
from pathlib import Path

import pytest

from gateway.core.events import EngineReport
from gateway.core.types import Reject, RejectReason, Report, Role, Slo, Wait
from gateway.driver import Driver
from gateway.journal import Journal
from gateway.metrics import OTHER, BoundedLabels, Coverage, Metrics
from gateway.records import Outcome, Recorder
from tests.builders import a_mesh, a_request, a_scheduler
from tests.record_builders import a_record, an_attempt

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.fixture
async def metrics() -> Metrics:
    """The metrics of a gateway in front of two engines of each role, one of which reported."""
    driver = Driver(a_scheduler(*a_mesh()), Journal(), recorder=Recorder(kept_count=4))
    driver.apply(EngineReport("p1", Report(running_count=2, waiting_count=1, kv_usage_ratio=0.25)))
    return Metrics(driver, max_tenants=2, version="1")


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


async def test_every_name_stands_in_the_readme(metrics):
    names = {family.name + ("_total" if family.type == "counter" else "") for family in metrics.registry.collect()}
    ours = {name for name in names if name.startswith("sluice_")}
    assert len(ours) > 30
    assert [name for name in sorted(ours) if f"`{name}`" not in README] == []


async def test_promtool_finds_nothing_to_complain_of(metrics):
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    metrics(a_record(slo=Slo(ttft_s=2.0, tbt_s=0.1)))
    metrics(a_record(outcome=Outcome.REFUSED, reason="queue_full", attempts=(an_attempt(sent_at=None),)))
    checking = await asyncio.create_subprocess_exec(promtool, "check", "metrics", stdin=PIPE, stdout=PIPE, stderr=PIPE)
    out, complaints = await checking.communicate(metrics.render())
    assert (out + complaints).decode() == ""
    assert checking.returncode == 0


async def test_a_served_request_counts_with_its_errors_and_headroom(metrics):
    record = a_record(slo=Slo(ttft_s=2.0, tbt_s=0.1))
    metrics(record)
    assert value(metrics, "sluice_requests_total", outcome="served", reason="none") == 1
    assert value(metrics, "sluice_decisions_total", decision="dispatch", reason="none") == 1
    assert value(metrics, "sluice_ttft_seconds_sum") == pytest.approx(record.ttft_s)
    assert value(metrics, "sluice_prediction_error_seconds_count", role="prefill") == 1
    assert value(metrics, "sluice_prediction_error_seconds_bucket", role="prefill", le="-0.1") == 1  # came early
    assert value(metrics, "sluice_prediction_error_seconds_bucket", role="decode", le="0.003") == 0
    assert value(metrics, "sluice_headroom_seconds_count", role="decode") == 1
    assert value(metrics, "sluice_prediction_coverage_ratio", role="prefill") == 1
    assert value(metrics, "sluice_prediction_coverage_ratio", role="decode") == 0
    assert value(metrics, "sluice_cached_tokens_total", source="predicted") == 32
    assert value(metrics, "sluice_cached_tokens_total", source="reported") == 48
    assert value(metrics, "sluice_tenant_tokens_total", tenant="default", kind="output") == 20


async def test_a_refusal_counts_by_its_reason_and_a_failure_in_words_does_not_become_a_label(metrics):
    metrics(a_record(outcome=Outcome.REFUSED, reason="queue_full", attempts=(an_attempt(sent_at=None),)))
    metrics(a_record(outcome=Outcome.BROKEN, reason="the engine's stream broke: line 3"))
    assert value(metrics, "sluice_requests_total", outcome="refused", reason="queue_full") == 1
    assert value(metrics, "sluice_decisions_total", decision="reject", reason="queue_full") == 1
    assert value(metrics, "sluice_requests_total", outcome="broken", reason="none") == 1


async def test_what_engines_report_is_read_at_the_scrape_and_goes_with_them(metrics):
    assert value(metrics, "sluice_engine_kv_usage_ratio", engine="p1", role="prefill") == 0.25
    assert value(metrics, "sluice_engine_report_age_seconds", engine="p1", role="prefill") >= 0
    assert value(metrics, "sluice_engine_report_age_seconds", engine="p2", role="prefill") is None
    assert value(metrics, "sluice_engine_up", engine="d2", role="decode") == 1


async def test_tenants_beyond_the_bound_are_counted_together(metrics):
    for tenant in ("a", "b", "c", "d", "a"):
        metrics(a_record(tenant=tenant))
    counted = {name: value(metrics, "sluice_tenant_requests_total", tenant=name, outcome="served") for name in "abcd"}
    assert counted == {"a": 2, "b": 1, "c": None, "d": None}
    assert value(metrics, "sluice_tenant_requests_total", tenant=OTHER, outcome="served") == 2


async def test_stranded_kv_is_told_by_connector_until_its_lease_ends(metrics):
    now = asyncio.get_running_loop().time()
    metrics.stranded.add("nixl", "p1", blocks=30, hold_s=1e6, now=now - 10.0)
    metrics.stranded.add("nixl", "p2", blocks=5, hold_s=2.0, now=now - 10.0)
    assert value(metrics, "sluice_stranded_kv_blocks", connector="nixl") == 30
    assert value(metrics, "sluice_stranded_hand_offs_total", connector="nixl") == 2
    assert value(metrics, "sluice_stranded_kv_block_seconds_total", connector="nixl") == pytest.approx(310, rel=0.05)


def test_labels_are_first_come():
    labels = BoundedLabels(2)
    assert [labels[name] for name in ("x", "y", "z", "x", "z")] == ["x", "y", OTHER, "x", OTHER]


def test_coverage_is_of_the_last_thousand():
    coverage = Coverage()
    assert coverage.ratio is None
    for number in range(1500):
        coverage.add(predicted_s=1.0, actual_s=2.0 if number < 700 else 1.0)
    assert coverage.ratio == pytest.approx(0.8)


async def test_a_wait_and_the_refusal_after_it_are_two_decisions():
    driver = Driver(a_scheduler(), Journal(), recorder=Recorder(kept_count=4))
    metrics = Metrics(driver, max_tenants=2)
    driver.recorder.observers.append(metrics)
    trail = driver.recorder.begin("r1", "r1", "/x", [], now=1.0)
    trail.gathered(a_request("r1"), now=1.0)
    driver.recorder.decided(Wait("r1", "engines_full", 3.0), None, attempt=1, decision_s=0.0, now=1.0)
    driver.recorder.woke([Reject("r1", RejectReason.WAITED_TOO_LONG, "no", 2.0)], {}, now=3.0)
    driver.recorder.finish(trail, outcome=Outcome.REFUSED, reason="waited_too_long", status=429, now=3.0)
    assert value(metrics, "sluice_decisions_total", decision="wait", reason="engines_full") == 1
    assert value(metrics, "sluice_decisions_total", decision="reject", reason="waited_too_long") == 1
    assert math.isclose(value(metrics, "sluice_wait_seconds_sum") or 0.0, 2.0)
    assert value(metrics, "sluice_prediction_coverage_ratio", role=Role.PREFILL) is None
