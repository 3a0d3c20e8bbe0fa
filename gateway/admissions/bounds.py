"""What the rules share: a predicted time against the bound the request asked for."""

from __future__ import annotations

from gateway.core.interfaces import Refusal
from gateway.core.types import RejectReason


def require_margin(margin: float) -> None:
    """Raises ValueError unless the margin is a factor above 0; the composition root turns it into a ConfigError."""
    if not 0.0 < margin < float("inf"):
        raise ValueError("margin must be above 0 and finite")


def refuse_ttft(ttft_s: float, bound_s: float | None, margin: float) -> Refusal | None:
    """A refusal when the first token is predicted too late. It may come back when the excess has been worked off."""
    if bound_s is None or ttft_s * margin <= bound_s:
        return None
    message = f"the first token is predicted after {ttft_s:.3g} s; at most {bound_s:g} s were asked for"
    return Refusal(RejectReason.TTFT_SLO, message, retry_after_s=ttft_s * margin - bound_s)


def refuse_tbt(tbt_s: float, bound_s: float | None, margin: float) -> Refusal | None:
    """A refusal when tokens are predicted too far apart."""
    if bound_s is None or tbt_s * margin <= bound_s:
        return None
    message = f"tokens are predicted {tbt_s:.3g} s apart; at most {bound_s:g} s were asked for"
    return Refusal(RejectReason.TBT_SLO, message)
