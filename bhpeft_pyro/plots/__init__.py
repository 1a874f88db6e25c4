"""Plots. Each draws on `ax` (or a new figure's) and returns it."""

from .fits import change_forest, elbo_trace, rank_ecdf, shift_by_layer
from .forecasts import epistemic_aleatoric, rejection, reliability, uncertainty_histogram

__all__ = [
    "change_forest",
    "elbo_trace",
    "epistemic_aleatoric",
    "rank_ecdf",
    "rejection",
    "reliability",
    "shift_by_layer",
    "uncertainty_histogram",
]
