"""The demonstration's two figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from .. import plots
from ..forecast import ClassForecast

__all__ = ["rejection", "reliability"]


def reliability(tests: Mapping[str, ClassForecast], path: Path) -> None:
    """Reliability diagrams side by side."""
    figure = _figure(len(tests))
    axes = figure.subplots(1, len(tests), squeeze=False)[0]
    for ax, (name, test) in zip(axes, tests.items(), strict=True):
        plots.reliability(test, ax=ax)
        ax.set_title(f"{name}: {ax.get_title()}", pad=16)
    figure.savefig(path, dpi=120)


def rejection(tests: Mapping[str, ClassForecast], path: Path) -> None:
    """Rejection curves in one diagram, by confidence: point estimates have nothing else."""
    figure = _figure(1)
    plots.rejection(tests, ax=figure.subplots(), by="confidence")
    figure.savefig(path, dpi=120)


def _figure(columns: int) -> Figure:
    # Not pyplot's: no window, no global list of figures, whatever the backend.
    return Figure(figsize=(4.6 * columns, 4.4), layout="constrained")
