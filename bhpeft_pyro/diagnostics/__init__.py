"""Diagnostics: how far a posterior may be trusted."""

from .calibration import Calibration
from .diagnosis import Diagnosis, diagnose
from .information import Information, information
from .psis import PSIS, psis
from .reference import Comparison, against
from .sbc import sbc

__all__ = [
    "PSIS",
    "Calibration",
    "Comparison",
    "Diagnosis",
    "Information",
    "against",
    "diagnose",
    "information",
    "psis",
    "sbc",
]
