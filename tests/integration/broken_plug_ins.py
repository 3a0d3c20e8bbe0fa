"""Plug-ins from outside the tree that fail."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gateway.core.interfaces import DecodeOutcome, PairTable
from gateway.core.types import Dispatch, Request
from predictors.analytic import Analytic


class PlugInBroke(Exception):
    """What the plug-ins here raise."""


@dataclass(frozen=True)
class Predictor(Analytic):
    """Breaks when it is told how a stream went: after the client has it."""

    def observe_decode(self, outcome: DecodeOutcome) -> None:
        raise PlugInBroke("/root/secret/path.py")


@dataclass(frozen=True)
class Policy:
    """Breaks at every choice."""

    def start(self, rng: random.Random) -> Policy:
        return self

    def costs(self, request: Request, pairs: PairTable, *, now: float) -> NDArray[np.float64]:
        raise PlugInBroke("/root/secret/path.py")

    def dispatched(self, request: Request, dispatch: Dispatch, *, now: float) -> None:
        raise PlugInBroke
