"""Settings of all tests."""

import os
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import HealthCheck, settings

# No deadline: shared machines stall for longer than any test should take, and a slow example is not a wrong one.
settings.register_profile("sluice", deadline=None, suppress_health_check=[HealthCheck.too_slow])
# A landing must not depend on the luck of a draw; everywhere else each run looks at other examples.
settings.register_profile("ci", settings.get_profile("sluice"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "sluice")


@pytest.fixture(autouse=True)
def log_as_before() -> Iterator[None]:
    """A test that runs a command in this process leaves no log level behind: others look at what is logged."""
    yield
    structlog.reset_defaults()
