"""Diagnostics: how far a posterior may be trusted."""

from .psis import PSIS, Diagnosis, diagnose, psis
from .ranks import Calibration
from .reference import Comparison, against
from .sbc import sbc

__all__ = ["PSIS", "Calibration", "Comparison", "Diagnosis", "against", "diagnose", "psis", "sbc"]
