"""Ranks: the test of their uniformity, its false alarms, its power and its band; the plot."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from bhpeft_pyro.diagnostics import Calibration
from bhpeft_pyro.diagnostics.ranks import band, uniform


@pytest.mark.parametrize("draws", [1, 2, 9])
def test_uniform_ranks_have_the_right_spread_however_few_there_are(draws: int) -> None:
    ranks = (torch.arange(1200) % (draws + 1)).unsqueeze(1)
    assert Calibration(["w"], ranks, draws, 0.05).shape("w") == ""


def test_false_alarms_are_as_declared() -> None:
    generator = np.random.default_rng(1)
    ranks = generator.integers(0, 100, (2000, 50))
    p = np.array([uniform(row, draws=99) for row in ranks])
    for level in (0.01, 0.05, 0.2):
        # Discrete ranks make the test a little conservative, never more than declared.
        assert binomtest(int((p < level).sum()), 2000, level, "greater").pvalue > 1e-3
        assert (p < level).mean() > level / 2
    lower, upper = band(50, 99, 0.95)
    ecdf = np.stack([np.bincount(row, minlength=100).cumsum()[:-1] for row in ranks]) / 50
    inside = ((ecdf >= lower) & (ecdf <= upper)).all(1).mean()
    assert 0.93 < inside < 0.98  # the sd of this share is 0.005


def test_band_against_the_binomial_at_one_point() -> None:
    """With one draw the ECDF has one point, R/2 on average: a plain binomial interval."""
    lower, upper = band(100, 1, 0.95)
    assert (lower[0], upper[0]) == (0.40, 0.60)
    # P(Bin(100, 0.5) <= 40) = 0.0284, twice that for both sides
    assert uniform(np.repeat([0, 1], [40, 60]), draws=1) == pytest.approx(0.0569, abs=0.008)
    # Where simulations end: all ranks at one end have a probability of 2 / 2^R.
    assert uniform(np.zeros(30, int), draws=1) == pytest.approx(2 / 2**30)
    # The upper end has no rounding error: counts that lie on it are inside.
    for replications in (50, 200):
        lower, upper = band(replications, 9, 0.95)
        assert set(upper) <= {count / replications for count in range(replications + 1)}
        np.testing.assert_allclose(upper, 1 - lower[::-1])


def test_many_quantities_fail_as_few_do() -> None:
    """There p-values have to be smaller than any number of simulations can tell."""
    count = 500
    names = tuple(map(str, range(count)))
    exact = torch.from_numpy(np.random.default_rng(0).integers(0, 100, (100, count)))
    assert Calibration(names, exact, draws=99).passed
    wrong = exact.clone()
    wrong[:, 7] = 0
    calibration = Calibration(names, wrong, draws=99)
    assert calibration.failed == ["7"]
    lower, upper = band(100, 99, 1 - 0.01 / count)
    ecdf = np.bincount(wrong[:, 7], minlength=100).cumsum()[:-1] / 100
    assert ((ecdf < lower) | (ecdf > upper)).any()


def test_plot() -> None:
    found = Calibration(
        ("bad", "good"), torch.stack([torch.full((100,), 20), torch.arange(100)], 1), draws=99
    )
    ax = found.plot()
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == ["band", "bad"]  # what stays in the band is not named
    bad = next(line for line in ax.lines if line.get_label() == "bad")
    heights = np.asarray(bad.get_ydata())
    assert heights[0] == pytest.approx(-0.01) and heights[20] == pytest.approx(1 - 0.21)
    plt.close(ax.figure)  # type: ignore[arg-type]
