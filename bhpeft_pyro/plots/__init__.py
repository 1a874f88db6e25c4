"""Plots. Each draws on `ax` (or a new figure's) and returns it; `stream_overview` is a figure."""

from .fits import change_forest, elbo_trace, stream_overview
from .forecasts import epistemic_aleatoric, novelty, rejection, reliability

__all__ = [
    "change_forest",
    "elbo_trace",
    "epistemic_aleatoric",
    "novelty",
    "rejection",
    "reliability",
    "stream_overview",
]
