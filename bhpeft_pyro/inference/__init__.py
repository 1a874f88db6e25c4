"""Inference: the loss, steps and the loop over them, the width of `laplace`, and prediction."""

from .elbo import ELBO
from .passes import whole_batch
from .report import FitReport

__all__ = ["ELBO", "FitReport", "whole_batch"]
