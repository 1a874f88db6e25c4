"""The plots of a report, as PNG files in memory."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .. import plots
from ..change import changes
from ..forecast import ClassForecast
from ..inference.predict import AnyForecast
from ..inference.report import FitReport
from ..posterior import Posterior

__all__ = ["of_forecast", "of_posterior", "of_round"]

Plots = dict[str, bytes]
"""A caption, and the PNG."""


def of_round(report: FitReport) -> Plots:
    """How the loss went."""
    if not report.history:
        return {}
    return {"ELBO trace": _png(lambda ax: plots.elbo_trace(report.history, ax))}


def of_posterior(posterior: Posterior) -> Plots:
    """What the PEFT weights do."""
    if not posterior.model.network.kinds:
        return {}
    found = changes(posterior)
    rows = max(map(len, found.values()))
    height = 1.5 + rows * (0.15 + 0.12 * len(found))
    return {"Change by layer": _png(lambda ax: plots.change_forest(found, ax), height)}


def of_forecast(forecast: AnyForecast) -> Plots:
    """How good a labelled forecast is, and whether its uncertainty says so."""
    found = {
        "Quality of what is kept when the least certain are rejected": _png(
            lambda ax: plots.rejection(forecast, ax=ax)
        ),
        "Epistemic and aleatoric uncertainty": _png(
            lambda ax: plots.epistemic_aleatoric(forecast, ax=ax)
        ),
    }
    if isinstance(forecast, ClassForecast):
        found = {
            "Reliability": _png(lambda ax: plots.reliability(forecast, ax=ax)),
            "Uncertainty of right and wrong predictions": _png(
                lambda ax: plots.uncertainty_histogram(forecast, ax=ax)
            ),
        } | found
    return found


def _png(draw: Callable[[Axes], object], height: float = 4.2) -> bytes:
    # Not pyplot's: no window, no global list of figures, whatever the backend.
    figure = Figure(figsize=(5.4, height), layout="constrained")
    draw(figure.subplots())
    buffer = BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    return buffer.getvalue()
