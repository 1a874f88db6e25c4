"""Scores with their standard errors, beside the simplest forecast; differences, and chance."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from bhpeft_pyro.forecast import ClassForecast, LabelsForecast, RatingForecast
from bhpeft_pyro.forecast.metrics import Score, compared, mean_and_error


def classes(right: list[bool], **how: object) -> ClassForecast:
    """Of two classes, of which all examples have the first."""
    sure = torch.tensor([[0.9, 0.1] if each else [0.2, 0.8] for each in right])
    return ClassForecast.from_draws(sure[None], labels=torch.zeros(len(right)), **how)


def test_the_error_is_that_of_a_mean():
    values = torch.randn(40, generator=torch.Generator().manual_seed(0))
    expected = values.double().std() / 40**0.5
    mean, error = mean_and_error(values)
    assert (mean, error) == pytest.approx((values.double().mean().item(), expected.item()))
    assert math.isnan(mean_and_error(torch.ones(1))[1])


def test_words_of_a_sentence_count_as_one():
    values = torch.randn(20, generator=torch.Generator().manual_seed(0))
    twice = values.repeat_interleave(2)
    rows = torch.arange(20).repeat_interleave(2)
    assert mean_and_error(twice, rows) == pytest.approx(mean_and_error(values))
    assert mean_and_error(twice)[1] < 0.8 * mean_and_error(values)[1]


def test_classes_are_beside_the_most_frequent_one():
    forecast = classes([True] * 30 + [False] * 10)
    score = Score.of(forecast, torch.tensor([1, 1, 0]))
    assert (score.value, score.other, score.clear) == (0.75, 0.0, True)
    assert score.error == pytest.approx(np.std([1] * 30 + [0] * 10, ddof=1) / 40**0.5)
    assert str(score) == (
        f"accuracy 0.750 ± {score.error:.3f} on 40 held-out rows "
        "(always the most frequent class: 0.000)"
    )
    chance = Score.of(forecast, torch.tensor([1, 0, 0]))
    assert chance.other == 1.0 and not chance.clear
    assert "; not clearly better than that: " in str(chance)


def test_other_kinds_are_beside_their_simplest_forecast():
    there = torch.tensor([[True, True, True, False], [True, True, False, False]])
    values = torch.tensor([[[0.5, 0.3, 0.2, 0.0], [0.4, 0.6, 0.0, 0.0]]])
    choices = ClassForecast.from_draws(values, labels=torch.tensor([0, 1]), choices=there)
    score = Score.of(choices, torch.zeros(2))
    assert score.value == 1.0 and score.other == pytest.approx((1 / 3 + 1 / 2) / 2)
    truth = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    several = LabelsForecast.from_draws(torch.tensor([[[0.9, 0.1], [0.9, 0.2]]]), labels=truth)
    score = Score.of(several, torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    assert (score.name, score.value, score.other) == ("share of right labels", 0.75, 0.75)
    labels = torch.tensor([1.0, 3.0, 5.0])
    ratings = RatingForecast.from_draws(labels[None] + 1, torch.ones(1, 3), labels=labels)
    score = Score.of(ratings, torch.tensor([1.0, 2.0]))
    assert score.value == pytest.approx(1.0)
    assert score.other == pytest.approx(((labels - 1.5) ** 2).mean().item())


def test_differences_are_of_the_same_rows():
    """Two forecasts with the same accuracy on other rows differ by chance; one that is right
    wherever the other is and on more rows is better."""
    before = classes([True, False] * 15)
    swapped, better = (
        classes([False, True] * 15),
        classes([True, True, True, False] * 7 + [True] * 2),
    )
    assert compared(swapped, before).count("(no significant difference)") == 2
    said = compared(better, before)
    gain = torch.tensor([0.0, 1.0, 0.0, 0.0] * 7 + [0.0, 1.0])
    error = gain.std().item() / 30**0.5
    assert said.startswith(f"accuracy +{gain.mean():.3f} ± {error:.3f} (better), NLL -")
    assert compared(before, better).startswith(f"accuracy -{gain.mean():.3f} ± {error:.3f} (worse)")
    rows = torch.arange(30) // 10
    grouped = (replace(each, rows=rows) for each in (better, before))
    assert f"± {error:.3f}" not in compared(*grouped)
