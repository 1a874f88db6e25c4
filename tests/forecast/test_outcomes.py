"""Ratings whose likelihood is not Normal: quantiles and scores of draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bhpeft_pyro.forecast import RatingForecast


def counts(draws: int = 4, count: int = 5, each: int = 50) -> RatingForecast:
    generator = torch.Generator().manual_seed(0)
    rate = 0.5 + 4 * torch.rand(draws, count, generator=generator)
    outcomes = torch.poisson(rate.unsqueeze(-1).expand(-1, -1, each), generator=generator)
    return RatingForecast.from_draws(rate, rate.sqrt(), outcomes=outcomes)


def test_quantiles_are_those_of_the_draws() -> None:
    forecast = counts()
    assert forecast.outcomes is not None
    for p in (0.05, 0.5, 0.9):
        for n in range(len(forecast)):
            pooled = forecast.outcomes[:, n].flatten().numpy()
            expected = np.quantile(pooled, p, method="inverted_cdf")
            assert forecast.quantile(p)[n].item() == expected
    lower, _ = forecast.interval(0.9)
    assert (lower >= 0).all() and (lower == lower.round()).all()  # no negative counts
    inside, width = forecast.coverage(forecast.mean, level=0.9)
    assert inside == 1.0 and width > 1


def test_crps_is_that_of_all_pairs_of_draws() -> None:
    forecast = counts(each=8)
    assert forecast.outcomes is not None
    labels = torch.tensor([0.0, 1.0, 2.0, 7.0, 30.0])
    for n in range(len(forecast)):
        pooled = forecast.outcomes[:, n].flatten().double()
        pairs = (pooled[:, None] - pooled[None, :]).abs().mean()
        expected = (pooled - labels[n]).abs().mean() - pairs / 2
        assert forecast.crps(labels)[n].item() == pytest.approx(expected.item(), rel=1e-9)


def test_extreme_quantiles_are_the_ends() -> None:
    forecast = counts()
    assert forecast.outcomes is not None
    least, most = forecast.outcomes.movedim(1, 0).flatten(1).aminmax(dim=1)
    assert torch.equal(forecast.quantile(1e-12), least)
    assert torch.equal(forecast.quantile(1 - 1e-12), most)


def test_draws_do_not_say_which_part_is_between_components() -> None:
    assert counts().between is None
    mean, sd = torch.zeros(2, 3), torch.ones(2, 3)
    exact = RatingForecast.from_draws(mean, sd, within=torch.ones(2, 3))
    assert exact.between is not None and torch.equal(exact.between, torch.zeros(3))
