"""What the draws of the weights predict, and what was observed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ..data import Examples
from ..forecast import RatingForecast
from ..inference.predict import predict
from .container import dataset

if TYPE_CHECKING:
    from ..posterior import Posterior

__all__ = ["predictions"]


def predictions(
    posterior: Posterior, examples: Examples, samples: int, seed: int
) -> dict[str, xr.Dataset]:
    """A label drawn from each draw's own forecast, and how probable it made the observed one."""
    labels = examples.labels
    forecast = predict(
        posterior.model, posterior.guide, examples, samples, seed=seed, keep_samples=True
    )
    generator = torch.Generator().manual_seed(seed)
    if isinstance(forecast, RatingForecast):
        predicted = torch.normal(forecast.means, forecast.sds, generator=generator)
        normal = torch.distributions.Normal(forecast.means, forecast.sds)
        fit = None if labels is None else normal.log_prob(labels)
    else:
        p = forecast.samples
        assert p is not None
        predicted = torch.multinomial(p.flatten(0, 1), 1, generator=generator).view(p.shape[:2])
        index = None if labels is None else labels.expand(len(p), -1).unsqueeze(-1)
        fit = None if index is None else p.gather(-1, index).squeeze(-1).log()
    coords = {"example": np.arange(len(examples))}
    by_draw = ("chain", "draw", "example")

    def drawn(values: Tensor) -> xr.Dataset:
        return dataset({"label": (by_draw, values.numpy()[None])}, coords, {})

    groups = {
        "posterior_predictive": drawn(predicted),
        "constant_data": xr.Dataset(
            {"text": (("example",), np.array(examples.texts, dtype=object))}, coords
        ),
    }
    if labels is not None and fit is not None:
        groups["log_likelihood"] = drawn(fit)
        groups["observed_data"] = xr.Dataset({"label": (("example",), labels.numpy())}, coords)
    return groups
