"""Forecasts of several labels a text."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch
from sklearn import metrics as peer
from torch import Tensor

from bhpeft_pyro.errors import ConfigError, DataError, LikelihoodError
from bhpeft_pyro.forecast import ClassForecast, LabelsForecast
from bhpeft_pyro.forecast.metrics import evaluate, rejection_curve
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


def test_scores_are_those_of_scikit_learn() -> None:
    p, labels = some()
    forecast = LabelsForecast.from_draws(p, labels=labels)
    scores = evaluate(forecast)
    mean = p.mean(0)
    truth, guessed = labels.numpy(), (mean > 0.5).numpy()
    assert scores["accuracy"] == pytest.approx(peer.accuracy_score(truth, guessed))
    assert scores["hamming"] == pytest.approx(peer.hamming_loss(truth, guessed))
    assert scores["f1"] == pytest.approx(peer.f1_score(truth, guessed, average="macro"))
    assert scores["f1_micro"] == pytest.approx(peer.f1_score(truth, guessed, average="micro"))
    losses = [peer.log_loss(truth[:, k], mean[:, k].double().numpy()) for k in range(3)]
    assert scores["nll"] == pytest.approx(sum(losses), rel=1e-5)
    assert forecast.nlls().shape == (40,)
    briers = [peer.brier_score_loss(truth[:, k], mean[:, k].double().numpy()) for k in range(3)]
    assert scores["brier"] == pytest.approx(sum(briers) / 3, rel=1e-5)
    kept = rejection_curve(forecast, fractions=[0.0])[1]
    assert kept.item() == pytest.approx(1 - scores["hamming"])


def test_a_mixture_is_that_of_all_draws() -> None:
    p, labels = some()
    parts = [LabelsForecast.from_draws(part, labels=labels) for part in p.split(3)]
    both, pooled = LabelsForecast.mixed(parts), LabelsForecast.from_draws(p)
    for name in ("probabilities", "total", "aleatoric", "epistemic"):
        torch.testing.assert_close(getattr(both, name), getattr(pooled, name), msg=name)
    assert both.between is not None and (both.between <= both.epistemic + 1e-6).all()
    assert both.between.max() > 0.01 and pooled.between is None
    assert both.labels is labels or torch.equal(both.labels, labels)  # type: ignore[arg-type]


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


def test_predictions_by_name_and_as_a_table() -> None:
    p = torch.tensor([[[0.9, 0.2, 0.7], [0.1, 0.2, 0.3]]])
    forecast = LabelsForecast.from_draws(
        p, labels=[[1, 1, 0], [0, 0, 0]], texts=["one", "two"], label_names=NAMES
    )
    assert forecast.predicted == [["art", "sport"], []]
    assert forecast.with_threshold([0.5, 0.1, 0.9]).predicted == [["art", "money"], ["money"]]
    rows = forecast.to_dataset().to_list()
    assert rows[0]["label"] == ["art", "money"] and rows[1]["label"] == []
    assert rows[0]["prediction"] == ["art", "sport"] and rows[0]["text"] == "one"
    entropies = [-q * math.log(q) - (1 - q) * math.log(1 - q) for q in (0.9, 0.2, 0.7)]
    assert rows[0]["total"] == pytest.approx(sum(entropies), rel=1e-5)
    without = LabelsForecast.from_draws(p, labels=[[1, 1, 0], [0, 0, 0]])
    assert without.predicted == without.summary()["prediction"] == [[1, 0, 1], [0, 0, 0]]
    assert [*without.to_dataset()["label"]] == [[1, 1, 0], [0, 0, 0]]
    assert "2 texts, 3 labels" in repr(forecast)


def test_what_does_not_fit_together_is_refused() -> None:
    p, labels = some()
    with pytest.raises(LikelihoodError, match=r"must be \(S, N, K\), got shape \(40, 3\)"):
        LabelsForecast.from_draws(p[0])
    with pytest.raises(DataError, match=r"labels has shape \(40,\), expected \(40, 3\)"):
        LabelsForecast.from_draws(p, labels=labels[:, 0])
    with pytest.raises(DataError, match="labels must be 0 or 1"):
        LabelsForecast.from_draws(p, labels=2 * labels)
    with pytest.raises(DataError, match="label_names has 2 names for 3 labels"):
        LabelsForecast.from_draws(p, label_names=["a", "b"])
    for threshold in (1.5, [0.5, 0.5]):
        with pytest.raises(DataError, match=r"expected a number in 0\.\.1, or 3 of them"):
            LabelsForecast.from_draws(p).with_threshold(threshold)
    with pytest.raises(ConfigError, match=r"measure.*epistemic"):
        LabelsForecast.from_draws(p).by_label("variance")  # type: ignore[arg-type]


def test_observed_labels_may_be_names() -> None:
    p, _ = some(count=2)
    forecast = LabelsForecast.from_draws(p, label_names=NAMES)
    for given in ([["sport"], []], [[0, 0, 1], [0, 0, 0]], torch.tensor([[0, 0, 1], [0, 0, 0]])):
        labels = forecast.with_labels(given).labels
        assert labels is not None and labels.tolist() == [[0, 0, 1], [0, 0, 0]]
    assert evaluate(forecast, [["sport"], []]) == evaluate(forecast, [[0, 0, 1], [0, 0, 0]])
    with pytest.raises(DataError, match="row 0: 'chess' is not one of"):
        forecast.with_labels([["chess"], []])
