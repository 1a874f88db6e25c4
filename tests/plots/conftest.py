"""Axes to draw on; no test leaves a figure open or a setting changed."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib
import matplotlib.pyplot as plt
import pytest
from matplotlib.axes import Axes


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    settings = dict(matplotlib.rcParams)
    yield
    plt.close("all")
    assert dict(matplotlib.rcParams) == settings


@pytest.fixture
def ax() -> Axes:
    return plt.subplots()[1]
