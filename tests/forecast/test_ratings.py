"""Forecasts of ratings against simulation and SciPy; those of draws of other likelihoods."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from bhpeft_pyro.errors import ConfigError
from bhpeft_pyro.forecast import RatingForecast


def some_ratings(draws: int = 6, count: int = 20) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mean = 3 * torch.randn(draws, count, generator=generator)
    return mean, 0.2 + torch.rand(draws, count, generator=generator)


def test_law_of_total_variance_against_simulation():
    mean, sd = some_ratings(count=3)
    forecast = RatingForecast.from_draws(mean, sd)
    rng = np.random.default_rng(0)
    which = rng.integers(len(mean), size=400_000)
    sample = rng.normal(mean.numpy()[which], sd.numpy()[which])
    np.testing.assert_allclose(forecast.mean.numpy(), sample.mean(0), atol=0.02)
    np.testing.assert_allclose(forecast.total.numpy(), sample.var(0), rtol=0.01)
    np.testing.assert_allclose(forecast.sd.numpy(), sample.std(0), rtol=0.01)
    np.testing.assert_allclose(forecast.epistemic.numpy(), mean.numpy().var(0), rtol=1e-5)
    np.testing.assert_allclose(forecast.aleatoric.numpy(), (sd**2).numpy().mean(0), rtol=1e-5)


def test_rating_draws_are_copied_without_gradients() -> None:
    mean, sd = some_ratings()
    given = {
        "mean": mean,
        "sd": sd,
        "within": sd.clone(),
        "densities": -sd,
        "outcomes": mean.unsqueeze(-1).clone(),
    }
    leaves = {name: tensor.requires_grad_() for name, tensor in given.items()}
    forecast = RatingForecast.from_draws(**leaves, labels=[0.0] * 20)
    names = ("means", "sds", "within", "densities", "outcomes")
    kept = {name: getattr(forecast, name).clone() for name in names}
    with torch.no_grad():
        for tensor in leaves.values():
            tensor.zero_()
    for name, before in kept.items():
        assert torch.equal(getattr(forecast, name), before), name
    assert not any(getattr(forecast, name).requires_grad for name in names)
    assert not forecast.nlls().requires_grad


def test_equal_rating_draws_have_no_epistemic_variance():
    mean, sd = some_ratings(1)
    forecast = RatingForecast.from_draws(mean.expand(5, -1), sd.expand(5, -1))
    assert (forecast.epistemic == 0).all()
    torch.testing.assert_close(forecast.sd, sd[0])


@pytest.mark.parametrize("level", [0.5, 0.9, 0.999])
@pytest.mark.parametrize("draws", [1, 6])
def test_the_interval_of_a_mixture_has_its_probability(level, draws):
    mean, sd = some_ratings(draws)
    ends = RatingForecast.from_draws(mean.double(), sd.double()).interval(level)
    components = stats.norm(mean.double().numpy(), sd.double().numpy())
    for end, below in zip(ends, ((1 - level) / 2, (1 + level) / 2), strict=True):
        np.testing.assert_allclose(components.cdf(end.numpy()).mean(0), below, atol=1e-9)
    with pytest.raises(ConfigError, match="probability"):  # of draws, this would be an end
        counts().interval(90)


def test_the_density_is_that_of_the_mixture():
    mean, sd = some_ratings()
    forecast = RatingForecast.from_draws(mean.double(), sd.double())
    values = torch.linspace(-3, 3, 20, dtype=torch.float64)
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(20, 6, dtype=torch.float64)),
        torch.distributions.Normal(mean.T.double(), sd.T.double()),
    )
    torch.testing.assert_close(-forecast.nlls(values), mixture.log_prob(values))


def test_the_nll_far_out_does_not_overflow():
    forecast = RatingForecast.from_draws(torch.zeros(2, 1), torch.ones(2, 1))
    assert forecast.nlls([100.0]).item() == pytest.approx(-stats.norm.logpdf(100.0), rel=1e-6)


# Draws of a likelihood that is not Normal


def counts(draws: int = 4, count: int = 5, by_draw: int = 50) -> RatingForecast:
    generator = torch.Generator().manual_seed(0)
    rate = 0.5 + 4 * torch.rand(draws, count, generator=generator)
    outcomes = torch.poisson(rate.unsqueeze(-1).expand(-1, -1, by_draw), generator=generator)
    return RatingForecast.from_draws(rate, rate.sqrt(), outcomes=outcomes)


def test_quantiles_are_those_of_the_draws() -> None:
    forecast = counts()
    assert forecast.outcomes is not None
    for p in (1e-12, 0.05, 0.5, 0.9, 1 - 1e-12):
        for n in range(len(forecast)):
            pooled = forecast.outcomes[:, n].flatten().numpy()
            expected = np.quantile(pooled, p, method="inverted_cdf")
            assert forecast.quantile(p)[n].item() == expected
    lower, _ = forecast.interval(0.9)
    assert (lower >= 0).all() and (lower == lower.round()).all()  # no negative counts
    inside, width = forecast.coverage(forecast.mean, level=0.9)
    assert inside == 1.0 and width > 1


def test_crps_is_that_of_all_pairs_of_draws() -> None:
    forecast = counts(by_draw=8)
    assert forecast.outcomes is not None
    labels = torch.tensor([0.0, 1.0, 2.0, 7.0, 30.0])
    for n in range(len(forecast)):
        pooled = forecast.outcomes[:, n].flatten().double()
        pairs = (pooled[:, None] - pooled[None, :]).abs().mean()
        expected = (pooled - labels[n]).abs().mean() - pairs / 2
        assert forecast.crps(labels)[n].item() == pytest.approx(expected.item(), rel=1e-9)


def test_draws_do_not_say_which_part_is_between_components() -> None:
    assert counts().between is None
    mean, sd = torch.zeros(2, 3), torch.ones(2, 3)
    exact = RatingForecast.from_draws(mean, sd, within=torch.ones(2, 3))
    assert exact.between is not None and torch.equal(exact.between, torch.zeros(3))
    # Nor is there such a part of a single component, or of a student.
    assert RatingForecast.from_draws(mean[:1], sd[:1], within=sd[:1]).between is None


def test_means_and_intervals_end_where_the_scale_does() -> None:
    mean = torch.tensor([[0.5, 3.0, 5.4], [0.7, 3.2, 6.0]])
    forecast = RatingForecast.from_draws(mean, torch.full_like(mean, 0.1), scale=(1.0, 5.0))
    low, high = forecast.interval(0.9)
    torch.testing.assert_close(forecast.mean, torch.tensor([1.0, 3.1, 5.0]))
    assert ((low <= forecast.mean) & (forecast.mean <= high)).all()
    above = RatingForecast.from_draws(mean, torch.full_like(mean, 0.1), scale=(1.0, None))
    assert above.mean.tolist() == pytest.approx([1.0, 3.1, 5.7])
