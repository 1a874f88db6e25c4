"""Thresholds above which few answers are wrong: over splits, by brute force, and beside MAPIE."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import Tensor

from bhpeft_pyro.decisions.thresholds import by_error, by_share, rows_needed

SPLITS = 300
ERROR, CONFIDENCE = 0.05, 0.9


class World:
    """Texts with a value in 0..1, and the error of those above each."""

    def __init__(self, kind: str) -> None:
        rng = np.random.default_rng(0)
        size = 400_000
        logit = np.abs(rng.normal(2.4, 2.0, size))
        value = 1 / (1 + np.exp(-logit))
        right = value
        if kind == "over-confident":
            right = 1 / (1 + np.exp(-0.7 * logit))
        if kind == "wrong where most certain":  # so that R crosses the error three times
            right = np.where(value > 0.998, 0.93, np.where(value > 0.95, 0.985, value))
        order = np.argsort(-value)
        self.value, self.wrong = value[order], (rng.random(size) > right)[order]
        self.errors = self.wrong.cumsum() / np.arange(1, size + 1)

    def rows(self, count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        at = rng.integers(0, len(self.value), count)
        return torch.from_numpy(self.value[at]), torch.from_numpy(self.wrong[at])

    def above(self, threshold: float | None) -> tuple[float, float]:
        """The share of texts above a threshold, and their error."""
        count = 0 if threshold is None else int(np.searchsorted(-self.value, -threshold))
        return count / len(self.value), float(self.errors[count - 1]) if count else 0.0


def no_more_than(broken: int, share: float) -> bool:
    """Whether so many of the splits are within binomial error of a share."""
    return broken <= binom.ppf(0.999, SPLITS, share)


@pytest.mark.parametrize("kind", ["calibrated", "over-confident", "wrong where most certain"])
def test_promises_are_kept(kind: str) -> None:
    """Also where the error does not fall with the value, although thresholds are the rows' own."""
    world, rng = World(kind), np.random.default_rng(1)
    answered = {}
    for count in (80, 320, 1500):
        made = [
            world.above(by_error(*world.rows(count, rng), ERROR, CONFIDENCE)) for _ in range(SPLITS)
        ]
        assert no_more_than(sum(error > ERROR for _, error in made), 1 - CONFIDENCE), count
        answered[count] = np.mean([share for share, _ in made])
    if kind == "calibrated":  # of which 0.66 could be answered
        assert answered[80] > 0.06 and answered[320] > 0.33 and answered[1500] > 0.55, answered


def test_the_error_that_follows_from_a_share_is_kept_with_it() -> None:
    world, rng = World("over-confident"), np.random.default_rng(2)
    broken, bounds = 0, []
    for _ in range(SPLITS):
        threshold, bound = by_share(*world.rows(300, rng), 0.2, CONFIDENCE)
        share, error = world.above(threshold)
        broken += error > bound or share < 0.8
        bounds.append(bound - error)
    assert no_more_than(broken, 1 - CONFIDENCE) and 0.01 < np.mean(bounds) < 0.05


def test_a_share_is_kept_where_values_are_equal() -> None:
    """Two values, and the asked share lies between them: all rows of the lower go to people."""
    rng, broken = np.random.default_rng(4), 0
    for _ in range(2000):
        sure = rng.random(30) < 0.8 - 1e-6
        values = torch.from_numpy(np.where(sure, 1.0, 0.9))
        threshold, _ = by_share(values, torch.zeros(30, dtype=torch.bool), 0.2, CONFIDENCE)
        broken += threshold >= 0.9  # and more than a fifth of the texts would go to people
    assert broken <= binom.ppf(0.999, 2000, (1 - CONFIDENCE) / 2)


def test_the_sequence_of_tests_is_that_of_the_definition() -> None:
    """By brute force over all numbers of answered rows that are tested."""
    world, rng = World("calibrated"), np.random.default_rng(3)
    for count in (60, 90, 500, 2000):
        values, wrong = world.rows(count, rng)
        order = values.argsort(descending=True)
        first = min(max(count / 3, 1.1 * 45), 180, count)
        found = None
        for answered in np.unique(np.linspace(first, count, 50).round().astype(int)):
            mistakes = int(wrong[order[:answered]].sum())
            tail = sum(
                math.comb(answered, k) * ERROR**k * (1 - ERROR) ** (answered - k)
                for k in range(mistakes + 1)
            )
            if tail > 1 - CONFIDENCE:
                break
            found = answered
        threshold = by_error(values, wrong, ERROR, CONFIDENCE)
        assert (0 if threshold is None else int((values > threshold).sum())) == (found or 0)


def test_mapie_finds_the_same_threshold() -> None:
    control = pytest.importorskip("mapie.risk_control")
    world, rng = World("calibrated"), np.random.default_rng(4)
    risk = control.BinaryRisk(
        risk_occurrence=lambda y, p: y != p,
        risk_condition=lambda y, p: ~np.isnan(p),
        higher_is_better=False,
    )
    found = 0
    for count in (200, 400, 1000):
        values, wrong = world.rows(count, rng)
        ranks = np.unique(
            np.linspace(max(count / 3, 49.5) if count < 540 else 180, count, 50).round()
        )
        ordered = values.sort(descending=True).values.numpy()
        # It answers values at its threshold too, and ours are those of the next row.
        candidates = ordered[ranks.astype(int) - 1]
        mapie = control.MultiClassificationLTTController(
            lambda p: p,
            [risk],
            [ERROR],
            confidence_level=CONFIDENCE,
            best_predict_param_choice=control.abstention_rate,
            list_predict_params=candidates,
            classes=[0, 1],
            fwer_method="fixed_sequence",
        )
        both = np.stack([values.numpy(), 1 - values.numpy()], 1)
        with warnings.catch_warnings(action="ignore"):
            mapie.calibrate(both, wrong.long().numpy())
        threshold = by_error(values, wrong, ERROR, CONFIDENCE)
        if threshold is None:
            assert mapie.best_predict_param is None
            continue
        found += 1
        assert (values > threshold).sum() == (values >= mapie.best_predict_param).sum()
    assert found


def test_rows_of_the_same_value_are_answered_together() -> None:
    values = torch.tensor([1.0] * 70 + [0.9] * 40 + [0.5] * 90)
    wrong = torch.zeros(200, dtype=torch.bool)
    wrong[110:] = torch.arange(90) % 2 == 0
    assert by_error(values, wrong, ERROR, CONFIDENCE) == 0.5
    assert by_error(values[:110], wrong[:110], ERROR, CONFIDENCE) == -1  # all of them
    wrong[:] = True
    assert by_error(values, wrong, ERROR, CONFIDENCE) is None


def test_the_fewest_rows() -> None:
    for error in (0.01, 0.05, 0.1, 0.3):
        fewest = rows_needed(error, 0.9)
        assert binom.cdf(0, fewest, error) <= 0.1 < binom.cdf(0, fewest - 1, error)
