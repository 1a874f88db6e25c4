"""Forecasts of several labels a text."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch
from sklearn import metrics as peer
from torch import Tensor

from bhpeft_pyro.errors import DataError
from bhpeft_pyro.forecast import ClassForecast, LabelsForecast
from bhpeft_pyro.prediction.predict import probabilities_of

NAMES = ["art", "money", "sport"]


def some(draws: int = 6, count: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    p = (2 * torch.randn(draws, count, 3, generator=generator)).sigmoid()
    return p, (torch.rand(count, 3, generator=generator) < p[0]).float()


def test_each_label_is_a_forecast_of_two_classes() -> None:
    p, _ = some()
    forecast = LabelsForecast.from_draws(p, keep_samples=True)
    total = torch.zeros(40)
    for k in range(3):
        two = ClassForecast.from_draws(torch.stack([1 - p[..., k], p[..., k]], -1))
        torch.testing.assert_close(forecast.probabilities[:, k], two.probabilities[:, 1])
        for measure in ("epistemic", "aleatoric", "total"):
            found = forecast.by_label(measure)[:, k]
            torch.testing.assert_close(found, getattr(two, measure))
        total += two.total
    torch.testing.assert_close(forecast.total, total)
    torch.testing.assert_close(forecast.total, forecast.epistemic + forecast.aleatoric)
    torch.testing.assert_close(forecast.samples, p)
    assert forecast.flag(0.1).tolist() == total.argsort(descending=True)[:4].tolist()


@pytest.mark.parametrize("logit", [15.0, 17.0, 20.0, 30.0])
def test_a_sure_prediction_that_is_wrong_costs_its_logit(logit: float) -> None:
    """In single precision 1 - p is 0 from 17 on, and the NLL 87."""
    distribution = dist.Bernoulli(logits=torch.full((1, 2, 3), logit)).to_event(1)
    (probabilities,) = probabilities_of(distribution, None)
    forecast = LabelsForecast.from_draws(probabilities, labels=torch.zeros(2, 3))
    assert forecast.nlls().tolist() == pytest.approx([3 * logit] * 2, rel=1e-3)


def test_the_best_threshold_is_the_best_of_all() -> None:
    p, labels = some(draws=2)
    p[:, 5:9] = p[:, :1]  # ties
    labels[:, 2] = 0.0
    forecast = LabelsForecast.from_draws(p, labels=labels)
    found = forecast.best_threshold()
    assert found[2] == 1.0  # nobody has it
    mean = forecast.probabilities
    for k in range(2):
        best = max(
            peer.f1_score(labels[:, k], mean[:, k] > threshold, zero_division=0.0)
            for threshold in [0.0, *mean[:, k].tolist()]
        )
        own = forecast.with_threshold(found)
        assert peer.f1_score(labels[:, k], own.label[:, k]) == pytest.approx(best)
    assert not forecast.with_threshold(found).label[:, 2].any()
    assert forecast.label[:, 2].any()  # one half by default


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "p",
    [
        torch.tensor([20.0, 19.0, 18.5, -1.0], dtype=torch.float64).sigmoid(),
        torch.tensor([0.7000000001, 0.7, 0.2, 0.1], dtype=torch.float64),
        torch.tensor([1.0, math.nextafter(1.0, 0.0), 0.2, 0.1], dtype=torch.float64),
    ],
)
def test_thresholds_tell_near_probabilities_apart(p: Tensor, dtype: torch.dtype) -> None:
    p, labels = p.to(dtype), torch.tensor([[1.0], [0.0], [0.0], [0.0]])
    forecast = LabelsForecast.from_draws(p[None, :, None], labels=labels)
    found = forecast.with_threshold(forecast.best_threshold())
    best = max(
        peer.f1_score(labels[:, 0], p > threshold, zero_division=0.0) for threshold in [0.0, *p]
    )
    assert peer.f1_score(labels[:, 0], found.label[:, 0]) == best
    assert best == 1.0 or dtype == torch.float32


def test_labels_are_lists_of_names_or_a_number_for_each() -> None:
    p = torch.tensor([[[0.9, 0.2, 0.7], [0.1, 0.2, 0.3]]])
    forecast = LabelsForecast.from_draws(p, label_names=NAMES)
    assert forecast.predicted == [["art", "sport"], []]
    assert forecast.with_threshold([0.5, 0.1, 0.9]).predicted == [["art", "money"], ["money"]]
    for given in ([["sport"], []], [[0, 0, 1], [0, 0, 0]], torch.tensor([[0, 0, 1], [0, 0, 0]])):
        assert forecast.with_labels(given).observed().tolist() == [[0, 0, 1], [0, 0, 0]]
    with pytest.raises(DataError, match="row 0: 'chess' is not one of"):
        forecast.with_labels([["chess"], []])
    without = LabelsForecast.from_draws(p, labels=[[1, 1, 0], [0, 0, 0]])
    assert without.predicted == [["0", "2"], []]
    assert [*without.table()["label"]] == [["0", "1"], []]
