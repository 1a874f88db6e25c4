"""Temperature scaling: recovers planted temperatures, beats a grid, leaves accuracy alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bhpeft_pyro.errors import ConfigError, DataError
from bhpeft_pyro.forecast import ClassForecast
from bhpeft_pyro.forecast.metrics import evaluate


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
def test_planted_temperatures_are_recovered(temperature):
    forecast = planted(temperature)
    assert forecast.tempered(forecast)[1] == pytest.approx(temperature, rel=0.03)


@pytest.mark.parametrize("temperature", [0.3, 1.7])
def test_no_other_temperature_is_better(temperature):
    forecast = planted(temperature, count=500)
    mended, best = forecast.tempered(forecast)
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


def test_validation_needs_labels():
    bare = forecast_of(torch.zeros(3, 2))
    with pytest.raises(DataError, match="labels are needed"):
        bare.tempered(bare)
    with pytest.raises(ConfigError, match="validation: expected a ClassForecast"):
        bare.tempered(bare.probabilities)
