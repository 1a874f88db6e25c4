"""Forecasts of classes against loops and known cases; temperature scaling."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from bhpeft_pyro.errors import DataError
from bhpeft_pyro.forecast import ClassForecast
from bhpeft_pyro.forecast.metrics import evaluate


def some_draws(draws: int = 7, count: int = 30, classes: int = 4, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(draws, count, classes, generator=generator)).softmax(-1)


def entropy(row: list[float]) -> float:
    return -sum(p * math.log(p) for p in row if p > 0)


def test_decomposition_is_that_of_a_loop():
    draws = some_draws()
    forecast = ClassForecast.from_draws(draws)
    for n in range(draws.shape[1]):
        rows = draws[:, n].double().tolist()
        mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        aleatoric = sum(entropy(row) for row in rows) / len(rows)
        variance = sum(
            (row[k] - mean[k]) ** 2 / len(rows) for row in rows for k in range(len(mean))
        )
        assert forecast.probabilities[n].tolist() == pytest.approx(mean, rel=1e-6)
        assert forecast.total[n].item() == pytest.approx(entropy(mean), rel=1e-6)
        assert forecast.aleatoric[n].item() == pytest.approx(aleatoric, rel=1e-6)
        assert forecast.epistemic[n].item() == pytest.approx(entropy(mean) - aleatoric, abs=1e-6)
        assert forecast.variance[n].item() == pytest.approx(variance, rel=1e-5)
        assert forecast.label[n].item() == mean.index(max(mean))
        assert forecast.confidence[n].item() == pytest.approx(max(mean), rel=1e-6)


def test_equal_draws_have_no_epistemic_uncertainty_at_all():
    draws = some_draws(1).expand(9, -1, -1)
    forecast = ClassForecast.from_draws(draws)
    assert (forecast.epistemic == 0).all()
    assert (forecast.variance == 0).all()
    assert torch.equal(forecast.probabilities, draws[0])
    ties = ClassForecast.from_draws(torch.full((2, 50, 2), 0.5))
    assert ties.flag(1.0).tolist() == list(range(50))  # in order


def test_one_hot_draws_that_disagree_have_no_aleatoric_uncertainty():
    draws = torch.eye(4)[:, None, :]  # draw s is sure of class s
    forecast = ClassForecast.from_draws(draws)
    assert forecast.aleatoric.item() == 0
    assert forecast.epistemic.item() == pytest.approx(math.log(4))
    assert forecast.variance.item() == pytest.approx(4 * (0.25 - 0.25**2))
    assert "1 examples, 4 classes, 4 draws" in repr(forecast)
    assert "1.3863 = 0.0000 aleatoric + 1.3863 epistemic" in repr(forecast)


def test_ragged_choices_have_the_uncertainty_of_the_choices_that_exist():
    draws = some_draws(classes=3)
    padded = torch.nn.functional.pad(draws, (0, 2))
    choices = torch.tensor([True, True, True, False, False]).expand(30, 5)
    forecast = ClassForecast.from_draws(padded, choices=choices)
    expected = ClassForecast.from_draws(draws)
    for name in ("total", "aleatoric", "epistemic", "variance", "label", "confidence"):
        torch.testing.assert_close(getattr(forecast, name), getattr(expected, name))


@pytest.mark.parametrize(
    ("names", "every", "other"),
    [
        ("abcd", [["c", "a", "d"], np.array([*"cad"]), [2, 0, 3]], 4),
        # Names that are numbers are names, as in `Posterior.evaluate`.
        ("1234", [["3", "1", "4"], np.array([3, 1, 4]), [3, np.int64(1), 4], (3.0, 1.0, 4.0)], 0),
        (["bad", "good"], [["good", "bad", "good"], [1, 0, 1]], 2),
        (["False", "True"], [[True, False, True], torch.tensor([True, False, True])], "yes"),
    ],
)
def test_labels_of_any_kind(names: Any, every: list[Any], other: Any) -> None:
    p = torch.full((1, 3, len(names)), 1 / len(names))
    forecast = ClassForecast.from_draws(p, label_names=[*names])
    expected = [1, 0, 1] if len(names) == 2 else [2, 0, 3]
    for labels in (*every, torch.tensor(expected), torch.tensor(expected).double()):
        assert forecast.with_labels(labels).observed().tolist() == expected
    with pytest.raises(DataError, match=str(other)):
        forecast.with_labels([other] * 3)


def test_labels_may_be_a_column_of_any_library() -> None:
    truth, forecast = [2, 0, 3], ClassForecast.from_draws(some_draws()[:, :3])
    for labels in (truth, np.array(truth), pd.Series(truth, index=[7, 8, 9], dtype="Int64")):
        assert forecast.with_labels(labels).observed().tolist() == truth


def test_half_precision_draws_are_taken_and_summed_in_full():
    draws = some_draws(64).bfloat16()
    forecast = ClassForecast.from_draws(draws)
    assert forecast.probabilities.dtype == torch.float32
    torch.testing.assert_close(forecast.probabilities, draws.float().mean(0))


# Temperature scaling


def forecast_of(logits: Tensor, labels: Tensor | None = None) -> ClassForecast:
    return ClassForecast.from_draws(logits.softmax(-1)[None], labels=labels)


def planted(temperature: float, count: int = 20_000) -> ClassForecast:
    """A forecast that is calibrated once its logits are divided by `temperature`."""
    generator = torch.Generator().manual_seed(0)
    logits = 1.5 * torch.randn(count, 4, generator=generator, dtype=torch.float64)
    labels = logits.softmax(-1).multinomial(1, generator=generator)[:, 0]
    return forecast_of(temperature * logits, labels)


def fitted(logits: Tensor, labels: list[int]) -> float:
    forecast = forecast_of(logits, torch.tensor(labels))
    return forecast.tempered(forecast)[1]


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 2.0, 10.0])
def test_planted_temperatures_are_recovered_and_no_other_is_better(temperature):
    forecast = planted(temperature)
    mended, best = forecast.tempered(forecast)
    assert best == pytest.approx(temperature, rel=0.03)
    for factor in (0.5, 0.98, 0.999, 1.001, 1.02, 2.0):
        other = forecast_of(forecast.log_probabilities / (factor * best), forecast.labels)
        assert evaluate(other)["nll"] > evaluate(mended)["nll"]


@pytest.mark.parametrize(("size", "right"), [(4.0, 3), (0.1, 19), (0.3, 99), (30.0, 8), (60.0, 8)])
def test_closed_form_of_two_classes(size, right):
    # The best T has sigmoid(size / T) = right / (right + 1). A descent from T = 1 that is cut off
    # at the limits gets stuck at them.
    logits = torch.tensor([[size, 0.0]] * (right + 1), dtype=torch.float64)
    found = fitted(logits, [0] * right + [1])
    assert found == pytest.approx(size / math.log(right), rel=1e-5)


def test_accuracy_stays_and_a_temperature_above_one_makes_it_less_confident():
    forecast = planted(2.0, count=2000)
    mended, _ = forecast.tempered(forecast)
    assert torch.equal(mended.label, forecast.label)
    assert (mended.confidence <= forecast.confidence).all()
    assert (mended.epistemic == 0).all()


def test_choices_that_do_not_exist_take_no_part():
    forecast = planted(2.0, count=500)
    probabilities = torch.nn.functional.pad(forecast.probabilities, (0, 2))
    padded = ClassForecast.from_draws(
        probabilities[None], labels=forecast.labels, choices=probabilities > 0
    )
    mended, temperature = padded.tempered(padded)
    expected, own = forecast.tempered(forecast)
    assert temperature == pytest.approx(own)
    torch.testing.assert_close(mended.probabilities[:, :4], expected.probabilities)
    assert (mended.probabilities[:, 4:] == 0).all()


def test_optima_at_the_ends_stay_within_the_limits():
    logits = torch.tensor([[4.0, 0.0], [0.0, 4.0]])
    assert 0.01 <= fitted(logits, [0, 1]) < 0.3  # always right
    assert 30 < fitted(logits, [1, 0]) <= 100  # always wrong
