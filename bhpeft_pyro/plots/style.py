"""Colours, marks and axes of all plots.

The colours are Okabe and Ito's, told apart by colour-blind readers; marks and dashes differ too.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

__all__ = [
    *("BLUE", "GREEN", "GREY", "ORANGE", "PURPLE", "SKY", "STYLES", "VERMILLION"),
    "new_axes",
]

BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, GREY = (
    "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#767676"
)  # fmt: skip
STYLES = tuple(zip((BLUE, VERMILLION, GREEN, ORANGE, PURPLE), "osD^v", strict=True))


def new_axes(ax: Axes | None) -> Axes:
    """The given axes or a new figure's, without the frame."""
    if ax is None:
        ax = plt.subplots(layout="constrained")[1]
    ax.spines[["top", "right"]].set_visible(False)
    return ax
