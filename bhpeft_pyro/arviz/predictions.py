"""What draws of the weights predict, and what was observed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ..data import Examples
from ..diagnostics.passes import max_rows
from ..forecast import RatingForecast
from ..inference.feed import Feed
from ..inference.predict import predict
from ..model import Model
from .container import dataset

__all__ = ["predictions"]

_DIMS = ("chain", "draw", "example")


def predictions(
    model: Model,
    guides: Sequence[Callable[..., Any]],
    examples: Examples,
    samples: int,
    seed: int,
) -> dict[str, xr.Dataset]:
    """A label drawn from each draw's own forecast, and how probable it made the observed one.

    Args:
        model: the model.
        guides: one a chain, and the prior last; draws have the seeds `seed`, `seed` + 1, ...
        examples: the texts.
        samples: S, draws of each.
        seed: of the draws.
    """
    coords = {"example": np.arange(len(examples))}
    feed = Feed(model, examples)
    *passes, prior = [
        _outcome(model, guide, feed, samples, seed + i) for i, guide in enumerate(guides)
    ]

    def drawn(chains: Sequence[Tensor]) -> xr.Dataset:
        return dataset({"label": (_DIMS, torch.stack(list(chains)).numpy())}, coords)

    def given(**values: Any) -> xr.Dataset:
        return xr.Dataset({name: ("example", value) for name, value in values.items()}, coords)

    groups = {
        "posterior_predictive": drawn([labels for labels, _ in passes]),
        "prior_predictive": drawn([prior[0]]),
        "constant_data": given(text=np.array(examples.texts, dtype=object)),
    }
    if examples.labels is not None:
        groups["log_likelihood"] = drawn([fit for _, fit in passes if fit is not None])
        groups["observed_data"] = given(label=examples.labels.numpy())
    return groups


def _outcome(
    model: Model, guide: Callable[..., Any], feed: Feed, samples: int, seed: int
) -> tuple[Tensor, Tensor | None]:
    """(S, N) labels, and log-likelihoods if the examples are labelled."""
    labels = feed.examples.labels
    forecast = predict(
        model, guide, feed, samples, max_rows=max_rows(feed), seed=seed, keep_samples=True
    )
    generator = torch.Generator().manual_seed(seed)
    if isinstance(forecast, RatingForecast):
        normal = torch.distributions.Normal(forecast.means, forecast.sds)
        predicted = torch.normal(forecast.means, forecast.sds, generator=generator)
        return predicted, None if labels is None else normal.log_prob(labels)
    p = forecast.samples
    assert p is not None
    predicted = torch.multinomial(p.flatten(0, 1), 1, generator=generator).view(p.shape[:2])
    if labels is None:
        return predicted, None
    return predicted, p.gather(-1, labels.expand(len(p), -1).unsqueeze(-1)).squeeze(-1).log()
