"""A posterior's predictions compared with those of reference draws, for example of NUTS."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import bhpeft_pyro as bh


def against(
    posterior: bh.Posterior, draws: Mapping[str, Tensor], texts: list[str], samples: int
) -> tuple[float, float]:
    """Of the mean ratings of texts: how far the posterior's are off, in sds of the reference (root
    mean square), and its sds as multiples of the reference's (geometric mean)."""
    reference = bh.Posterior.from_draws(posterior.model, draws)
    count = len(next(iter(draws.values())))
    means = []
    for one, number in ((posterior, samples), (reference, count)):
        forecast = one.predict(texts, number, keep_samples=True)
        assert isinstance(forecast, bh.forecast.RatingForecast)
        means.append(forecast.means)
    ours, theirs = means
    errors: Tensor = (ours.mean(0) - theirs.mean(0)) / theirs.std(0)
    ratios: Tensor = (ours.std(0) / theirs.std(0)).log()
    return torch.linalg.vector_norm(errors).item() / len(errors) ** 0.5, ratios.mean().exp().item()
