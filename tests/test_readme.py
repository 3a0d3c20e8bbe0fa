"""The README says what is there: every setting, header, refusal reason and command."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from adapters import ADAPTERS
from gateway import config_reference, endings_reference
from gateway.cli import COMMANDS
from gateway.core.types import RejectReason
from gateway.handlers import PASSED_THROUGH, REFUSAL_STATUS
from gateway.policies import POLICIES
from gateway.readme_tables import insert
from predictors import PREDICTORS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_table_of_settings_is_that_of_the_code() -> None:
    start, end = README.index("<!-- settings:"), README.index("<!-- /settings -->")
    table = README[README.index("-->", start) + 3 : end].strip()
    assert table == config_reference.render().strip(), "run `make docs`"


def test_the_table_of_endings_is_that_of_the_code() -> None:
    assert insert(README, "endings", endings_reference.render()) == README, "run `make docs`"


@pytest.mark.parametrize("reason", list(RejectReason))
def test_every_reason_of_a_refusal_stands_with_its_status(reason: RejectReason) -> None:
    (row,) = re.findall(rf"^\| `{reason}` \| (.+?) \|", README, re.MULTILINE)
    assert str(REFUSAL_STATUS[reason]) in row


def test_every_header_we_write_is_explained() -> None:
    source = "".join(path.read_text() for path in (ROOT / "gateway").glob("*.py"))
    for header in set(re.findall(r'"(x-sluice-[a-z-]+|retry-after|x-request-id)"', source)):
        assert f"`{header}`" in README, header


def test_every_route_that_is_passed_through_is_named() -> None:
    for path in PASSED_THROUGH:
        assert path in README


@pytest.mark.parametrize("name", [*POLICIES, *PREDICTORS, *ADAPTERS])
def test_every_plug_in_is_named(name: str) -> None:
    assert f"`{name}`" in README or f'"{name}"' in README


def test_every_make_target_and_command_it_names_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    code = " ".join(re.findall(r"```bash\n(.+?)```|`(?:make|sluice) [a-z-]+", README, re.DOTALL))
    assert set(re.findall(r"make ([a-z-]+)", code)) <= targets
    assert set(re.findall(r"sluice ([a-z-]+)", code)) <= COMMANDS.keys()
    assert {"demo", "test", "engines", "test-engines"} <= set(re.findall(r"make ([a-z-]+)", code))
