"""Diagnostics: how far a posterior may be trusted."""

from .psis import PSIS, Diagnosis, diagnose, psis
from .ranks import Calibration
from .sbc import sbc

__all__ = ["PSIS", "Calibration", "Diagnosis", "diagnose", "psis", "sbc"]
