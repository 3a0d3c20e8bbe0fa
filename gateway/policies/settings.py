"""Checks of a policy's settings when it is made."""

from __future__ import annotations


def require(holds: bool, rule: str) -> None:
    """Raises ValueError with the rule when it does not hold; the composition root turns it into a ConfigError."""
    if not holds:
        raise ValueError(f"must hold: {rule}")
