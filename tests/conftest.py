"""Settings of all tests."""

from hypothesis import HealthCheck, settings

# No deadline: shared machines stall for longer than any test should take, and a slow example is not a wrong one.
settings.register_profile("sluice", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("sluice")
