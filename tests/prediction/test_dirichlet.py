"""Dirichlet distributions over class probabilities, against many draws of torch's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Dirichlet

from bhpeft_pyro.forecast import ClassForecast, LabelsForecast
from bhpeft_pyro.prediction.dirichlet import (
    class_forecast,
    expected_entropy,
    labels_forecast,
    precision_for,
)

MEANS = torch.tensor([[0.2, 0.5, 0.3], [0.9, 0.06, 0.04], [1 / 3, 1 / 3, 1 / 3]])
PRECISIONS = torch.tensor([0.7, 5.0, 80.0])
DRAWS = 40_000


def pairs_of(probabilities: Tensor) -> Tensor:
    return torch.stack([1 - probabilities, probabilities], -1)


def test_the_moments_of_classes_are_those_of_draws() -> None:
    draws = Dirichlet(MEANS * PRECISIONS.unsqueeze(1)).sample(torch.Size((DRAWS,)))
    expected = ClassForecast.from_draws(draws)
    forecast = class_forecast(MEANS, PRECISIONS, labels=[0, 1, 2])
    for name in ("probabilities", "total", "aleatoric", "epistemic", "variance"):
        torch.testing.assert_close(
            getattr(forecast, name), getattr(expected, name), atol=8e-3, rtol=0
        )
    assert forecast.labels is not None and forecast.nlls()[0] == pytest.approx(-math.log(0.2))


def test_the_moments_of_labels_are_those_of_draws() -> None:
    pairs = pairs_of(MEANS)
    draws = Dirichlet(pairs * PRECISIONS.reshape(-1, 1, 1)).sample(torch.Size((DRAWS,)))
    expected = LabelsForecast.from_draws(draws[..., 1])
    forecast = labels_forecast(MEANS, PRECISIONS)
    for measure in ("total", "aleatoric", "epistemic"):
        torch.testing.assert_close(
            forecast.by_label(measure), expected.by_label(measure), atol=8e-3, rtol=0
        )
    torch.testing.assert_close(forecast.probabilities, MEANS)


@pytest.mark.parametrize("several", [False, True])
def test_the_precision_is_found_again(several: bool) -> None:
    shown = pairs_of(MEANS) if several else MEANS
    forecast_of = labels_forecast if several else class_forecast
    precisions = torch.tensor([0.01, 3.0, 4e4])
    information = forecast_of(MEANS.double(), precisions).epistemic
    found = precision_for(shown, information)
    torch.testing.assert_close(found, precisions.double(), rtol=1e-2, atol=0)


def test_no_information_and_more_than_there_can_be() -> None:
    nothing, most = (
        precision_for(MEANS[:1], torch.zeros(1)),
        precision_for(MEANS[:1], torch.ones(1) * 9),
    )
    assert nothing.item() == pytest.approx(math.exp(18), rel=1e-6)
    assert most.item() == pytest.approx(math.exp(-12), rel=1e-6)
    sure = torch.tensor([[1.0, 0.0]])  # nothing to be uncertain about, at any precision
    assert precision_for(sure, torch.zeros(1)).isfinite().all()
    for precision in (nothing, most):
        forecast = class_forecast(MEANS[:1], precision)
        assert forecast.epistemic.isfinite().all() and (forecast.epistemic >= 0).all()


def test_a_class_that_does_not_exist_changes_nothing() -> None:
    wider = torch.nn.functional.pad(MEANS, (0, 2))
    torch.testing.assert_close(
        expected_entropy(wider, PRECISIONS), expected_entropy(MEANS, PRECISIONS)
    )
    exist = (wider > 0).expand_as(wider)
    forecast = class_forecast(wider, PRECISIONS, choices=exist)
    assert (forecast.probabilities[~exist] == 0).all()


def test_a_label_that_is_nearly_certain_keeps_its_digits() -> None:
    probabilities = torch.tensor([[1 - 1e-12]], dtype=torch.float64)
    forecast = labels_forecast(probabilities, torch.ones(1), labels=[[0.0]])
    assert forecast.nlls().item() == pytest.approx(12 * math.log(10), rel=1e-3)
