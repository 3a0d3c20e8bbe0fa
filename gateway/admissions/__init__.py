"""Admission rules: whom to refuse. Pure plug-ins; to add one: one file, one line in the table, one test file."""

from __future__ import annotations

from gateway.admissions.early import Early
from gateway.admissions.predicted import Predicted
from gateway.admissions.sluice import Sluice
from gateway.admissions.stage import Stage
from gateway.admissions.ttft import Ttft
from gateway.core.admission import AdmitAll
from gateway.core.interfaces import Admission

ADMISSIONS: dict[str, type[Admission]] = {
    "sluice": Sluice,
    "none": AdmitAll,
    "ttft": Ttft,
    "stage": Stage,
    "early": Early,
    "predicted": Predicted,
}

DEFAULT_ADMISSION = "sluice"
