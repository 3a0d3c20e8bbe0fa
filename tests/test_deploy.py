"""What deploy/ holds is sound, as far as a machine without containers can tell: parsed, checked by its own tools, and
naming only what exists."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.app import running
from gateway.config import from_flags, load

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
NOT_OURS = {"process_cpu_seconds_total", "process_resident_memory_bytes"}
"""Metrics of prometheus_client's own process collector."""


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text()))


def promtool(*words: str) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian's package prometheus)")
    done = subprocess.run(["promtool", *words], cwd=DEPLOY / "prometheus", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", sorted(DEPLOY.rglob("*.y*ml")), ids=lambda path: path.relative_to(DEPLOY).as_posix())
def test_every_yaml_file_parses(path: Path) -> None:
    assert all(document is not None for document in documents(path))


def test_prometheus_takes_its_configuration_and_rules() -> None:
    promtool("check", "config", "prometheus.yml")
    promtool("check", "rules", "rules.yml")


def test_the_alerts_fire_when_they_should_and_only_then() -> None:
    promtool("test", "rules", "rules_test.yml")


def alerts() -> list[dict[str, Any]]:
    groups = documents(DEPLOY / "prometheus/rules.yml")[0]["groups"]
    return [rule for group in groups for rule in group["rules"] if "alert" in rule]


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])
def test_every_alert_is_tested(alert: dict[str, Any]) -> None:
    tests = documents(DEPLOY / "prometheus/rules_test.yml")[0]["tests"]
    fired = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case["exp_alerts"]}
    assert alert["alert"] in fired


def settings() -> Iterator[tuple[str, str]]:
    yield "deploy/sluice.toml", (DEPLOY / "sluice.toml").read_text()
    for document in documents(DEPLOY / "kubernetes/sluice.yaml"):
        if document["kind"] == "ConfigMap":
            yield "kubernetes", document["data"]["sluice.toml"]


@pytest.mark.parametrize(("name", "text"), list(settings()), ids=lambda value: value if len(value) < 40 else "")
def test_the_gateway_takes_the_settings(name: str, text: str) -> None:
    assert load(text, os.environ).engines, name


def test_the_compose_file_names_engines_that_its_pools_serve() -> None:
    services = documents(DEPLOY / "compose.yaml")[0]["services"]
    served = set()
    for name, service in services.items():
        if "loadtest.fake_engine" in service.get("entrypoint", ()):
            words = service["command"]
            served |= {f"http://{name}:{port}" for flag, port in pairwise(words) if flag == "--port"}
    config = load((DEPLOY / "sluice.toml").read_text(), os.environ)
    assert {engine.url for engine in config.engines} == served


def test_files_that_the_compose_file_mounts_exist() -> None:
    for service in documents(DEPLOY / "compose.yaml")[0]["services"].values():
        for volume in service.get("volumes", ()):
            assert (DEPLOY / volume.split(":")[0]).exists(), volume
        build = service.get("build")
        assert build is None or (DEPLOY / build["context"] / build["dockerfile"]).exists()


def test_the_collector_knows_every_part_that_its_pipelines_name() -> None:
    config = documents(DEPLOY / "collector.yaml")[0]
    for pipeline in config["service"]["pipelines"].values():
        for kind, names in pipeline.items():
            assert set(names) <= config[kind].keys()
    assert set(config["service"]["extensions"]) <= config["extensions"].keys()


def test_the_image_copies_what_the_package_needs() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    for source in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in source.split()), source


@pytest.mark.parametrize("path", sorted((DEPLOY / "engines").glob("*.sh")), ids=lambda path: path.name)
def test_engine_scripts_are_sound_bash_and_say_what_they_want(path: Path) -> None:
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    done = subprocess.run([path], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "usage:" in done.stderr


def expressions() -> Iterator[tuple[str, str]]:
    """Where a PromQL expression stands, and itself."""
    dashboard = json.loads((DEPLOY / "grafana/dashboards/sluice.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield f"panel {panel['title']!r}", target["expr"]
    for group in documents(DEPLOY / "prometheus/rules.yml")[0]["groups"]:
        for rule in group["rules"]:
            yield f"rule {rule.get('alert') or rule['record']}", rule["expr"]


async def test_dashboard_and_alerts_name_only_metrics_that_exist() -> None:
    config = from_flags(engine_urls=["http://127.0.0.1:9"], port=0)
    async with running(config) as gateway:
        families = list(gateway.metrics.registry.collect())
    ends = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"], "gauge": [""]}
    known = {f"{family.name}{end}" for family in families for end in ends[family.type]}
    for place, expression in expressions():
        named = set(re.findall(r"\b(?:sluice|process)_[a-z0-9_]+", expression))
        assert named <= known | NOT_OURS, f"{place}: no such metric {named - known}"
        assert named or "up{" in expression or "sluice:" in expression, place
