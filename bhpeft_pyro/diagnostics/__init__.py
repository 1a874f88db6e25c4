"""Diagnostics: how far a posterior may be trusted."""

from .diagnosis import Diagnosis, Information, diagnose, information
from .psis import PSIS, psis
from .ranks import Calibration
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
