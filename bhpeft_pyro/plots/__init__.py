"""Plots. Each draws on `ax` (or a new figure's) and returns it; `stream_overview` is a figure."""

from .fits import change_forest, elbo_trace, score_matrix, shift_by_layer, stream_overview
from .forecasts import epistemic_aleatoric, novelty, rejection, reliability

__all__ = [
    "change_forest",
    "elbo_trace",
    "epistemic_aleatoric",
    "novelty",
    "rejection",
    "reliability",
    "score_matrix",
    "shift_by_layer",
    "stream_overview",
]
