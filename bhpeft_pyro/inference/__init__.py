"""Inference: the loss, natural gradients, the loop over steps, and prediction."""

from .elbo import ELBO
from .optimizers import NaturalGradient
from .options import FitOptions
from .report import FitReport

__all__ = ["ELBO", "FitOptions", "FitReport", "NaturalGradient"]
