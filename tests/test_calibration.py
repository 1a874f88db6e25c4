"""Temperature scaling: recovers planted temperatures, beats a grid, leaves accuracy alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bhpeft_pyro.errors import ConfigError, DataError, LikelihoodError
from bhpeft_pyro.forecast.temperature_scaling import fit_temperature, scale


def planted(temperature: float, count: int = 20_000) -> tuple[Tensor, Tensor]:
    """Logits that are calibrated once divided by `temperature`, and labels."""
    generator = torch.Generator().manual_seed(0)
    logits = 1.5 * torch.randn(count, 4, generator=generator, dtype=torch.float64)
    labels = logits.softmax(-1).multinomial(1, generator=generator)[:, 0]
    return temperature * logits, labels


def nll(logits: Tensor, labels: Tensor, temperature: float) -> float:
    return torch.nn.functional.nll_loss(scale(logits, temperature), labels).item()


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 2.0, 20.0])
def test_planted_temperatures_are_recovered(temperature):
    assert fit_temperature(*planted(temperature)) == pytest.approx(temperature, rel=0.03)


@pytest.mark.parametrize("temperature", [0.3, 1.7])
def test_no_other_temperature_is_better(temperature):
    logits, labels = planted(temperature, count=500)
    fitted = fit_temperature(logits, labels)
    best = nll(logits, labels, fitted)
    for factor in (0.5, 0.98, 0.999, 1.001, 1.02, 2.0):
        assert nll(logits, labels, factor * fitted) > best


def test_closed_form_of_two_classes():
    # right 3 times of 4 at a logit of 4: the best T has sigmoid(4 / T) = 3/4
    logits = torch.tensor([[4.0, 0.0]] * 4)
    fitted = fit_temperature(logits, torch.tensor([0, 0, 0, 1]))
    assert fitted == pytest.approx(4 / math.log(3), rel=1e-5)


@pytest.mark.parametrize(("size", "right"), [(0.1, 19), (0.3, 99), (30.0, 8), (150.0, 8)])
def test_optima_far_from_one_are_reached(size, right):
    # A descent from T = 1 that is cut off at the limits gets stuck at them.
    logits = torch.tensor([[size, 0.0]] * (right + 1))
    fitted = fit_temperature(logits, torch.tensor([0] * right + [1]))
    assert fitted == pytest.approx(size / math.log(right), rel=1e-6)


@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.0, 3.0, 100.0])
def test_accuracy_never_changes(temperature):
    logits, _ = planted(1.0, count=2000)
    scaled = scale(logits, temperature)
    assert torch.equal(scaled.argmax(-1), logits.argmax(-1))
    torch.testing.assert_close(scaled.exp().sum(-1), torch.ones(2000, dtype=torch.float64))
    confidence = scaled.amax(-1) - logits.log_softmax(-1).amax(-1)
    assert (confidence * (1 - temperature) >= 0).all()  # above 1 less confident, below 1 more


def test_logits_and_log_probabilities_are_as_good():
    logits, labels = planted(2.0, count=500)
    shifted = fit_temperature(logits + torch.arange(500)[:, None], labels)
    assert fit_temperature(logits.log_softmax(-1), labels) == pytest.approx(shifted, rel=1e-5)


def test_choices_that_do_not_exist_take_no_part():
    logits, labels = planted(2.0, count=500)
    padded = torch.cat([logits, torch.full((500, 2), -math.inf)], 1)
    assert fit_temperature(padded, labels) == pytest.approx(fit_temperature(logits, labels))
    scaled = scale(padded, 2.0)
    torch.testing.assert_close(scaled[:, :4], scale(logits, 2.0))
    assert (scaled[:, 4:] == -math.inf).all()


def test_optima_at_infinity_end_at_the_limits():
    logits = torch.tensor([[4.0, 0.0], [0.0, 4.0]])
    assert 0.01 <= fit_temperature(logits, torch.tensor([0, 1])) < 0.3  # always right
    assert 30 < fit_temperature(logits, torch.tensor([1, 0])) <= 100  # always wrong


def test_works_without_gradients_and_leaves_no_trace():
    logits, labels = planted(2.0, count=200)
    logits.requires_grad_()
    with torch.no_grad():
        assert fit_temperature(logits, labels) > 1
    assert logits.grad is None


def test_wrong_arguments_are_named():
    logits, labels = planted(1.0, count=10)
    with pytest.raises(LikelihoodError, match="log_probabilities"):
        fit_temperature(logits[0], labels)
    with pytest.raises(LikelihoodError, match="finite"):
        fit_temperature(logits * math.nan, labels)
    with pytest.raises(DataError, match="labels must be 10"):
        fit_temperature(logits, labels[:9])
    with pytest.raises(DataError, match=r"0\.\.3"):
        fit_temperature(logits, labels + 4)
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match="temperature"):
            scale(logits, temperature)
