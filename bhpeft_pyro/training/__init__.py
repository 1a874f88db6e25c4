"""Training: initial values, the loss, the loop over steps, and the report."""

from ..model.cached_batches import whole_batch
from .elbo import ELBO
from .report import FitReport

__all__ = ["ELBO", "FitReport", "whole_batch"]
