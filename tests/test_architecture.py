"""The arrows of the design: who may import whom, and what the pure core may not touch. Names the file and the rule."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"gateway", "adapters", "predictors", "loadtest"}
UNCLEAN = {"asyncio", "socket", "time", "datetime", "logging", "os", "threading", "subprocess", "selectors", "ssl"}
IO_LIBRARIES = {"aiohttp", "redis", "uvloop", "httptools", "zmq", "structlog", "opentelemetry", "locust"}
PLUG_INS = {
    "gateway/policies": {"numpy"},
    "gateway/admissions": {"numpy"},
    "adapters": {"numpy", "msgspec"},
    "predictors": {"numpy", "msgspec"},
}
"""Folder of plug-ins -> what it may import besides the standard library, gateway.core and itself."""
ONLY_IMPORTERS = {"opentelemetry": "gateway/telemetry.py", "redis": "gateway/stores/redis.py"}
FITTING = {"predictors/fit.py"}
"""The only files that may import scikit-learn."""


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: relative import"
            yield node.module or ""


def is_standard(module: str) -> bool:
    return module.partition(".")[0] in sys.stdlib_module_names


@pytest.mark.parametrize("path", sources("gateway/core"), ids=name_of)
def test_the_core_is_pure(path: Path) -> None:
    for module in imports(path):
        top = module.partition(".")[0]
        assert top not in UNCLEAN, f"{name_of(path)} imports {module}: the core has no IO and no clock"
        is_allowed = is_standard(module) or top == "numpy" or module.startswith("gateway.core")
        assert is_allowed, f"{name_of(path)} imports {module}: the core knows only itself and numpy"
    for node in ast.walk(ast.parse(path.read_text())):
        is_async = isinstance(node, ast.AsyncFunctionDef | ast.Await | ast.AsyncFor | ast.AsyncWith)
        assert not is_async, f"{name_of(path)}:{getattr(node, 'lineno', 0)}: the core never awaits"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"open", "print", "hash", "input"}, f"{name_of(path)}: calls {node.func.id}"


@pytest.mark.parametrize("folder", PLUG_INS)
def test_plug_ins_know_the_core_and_themselves(folder: str) -> None:
    package = folder.replace("/", ".")
    for path in sources(folder):
        for module in imports(path):
            top = module.partition(".")[0]
            is_own = module == package or module.startswith((f"{package}.", "gateway.core"))
            is_fit = top == "sklearn" and name_of(path) in FITTING
            is_allowed = is_own or is_standard(module) or top in PLUG_INS[folder] or is_fit
            assert is_allowed, f"{name_of(path)} imports {module}"
            assert top not in {"asyncio", "socket", "threading"}, f"{name_of(path)} imports {module}: plug-ins do no IO"


def test_only_one_file_imports_each_heavy_client() -> None:
    for folder in OURS:
        for path in sources(folder):
            for module in imports(path):
                owner = ONLY_IMPORTERS.get(module.partition(".")[0])
                assert owner in (None, name_of(path)), f"{name_of(path)} imports {module}: only {owner} may"


def test_the_gateway_does_not_need_the_test_bench() -> None:
    for path in sources("gateway"):
        assert not any(module.startswith("loadtest") for module in imports(path)), name_of(path)


@pytest.mark.parametrize("folder", ["gateway/core", "gateway/policies", "gateway/admissions", "predictors", "adapters"])
def test_pure_code_takes_time_as_a_keyword_named_now(folder: str) -> None:
    for path in sources(folder):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and "core" not in folder:
                positional = [argument.arg for argument in node.args.args]
                assert "now" not in positional, f"{name_of(path)}:{node.lineno}: {node.name} takes now by position"
