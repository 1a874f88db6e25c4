"""What draws of the weights predict, and what was observed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from pyro.distributions import TorchDistribution
from torch import Tensor

from ..data import Examples
from ..inference.draws import seeded
from ..inference.feed import Feed
from ..inference.passes import drawn, passes
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
    """A label drawn from the likelihood under each draw, and its log_prob of the observed one.

    Args:
        model: the model.
        guides: one a chain, and the prior last; draws have the seeds `seed`, `seed` + 1, ...
        examples: the texts.
        samples: S, draws of each.
        seed: of the draws.
    """
    coords = {"example": np.arange(len(examples))}
    feed = Feed(model, examples)
    *chains, prior = [
        _outcome(model, guide, feed, samples, seed + i) for i, guide in enumerate(guides)
    ]

    def each(values: Sequence[Tensor]) -> xr.Dataset:
        return dataset({"label": (_DIMS, torch.stack(list(values)).numpy())}, coords)

    def given(**values: Any) -> xr.Dataset:
        return xr.Dataset({name: ("example", value) for name, value in values.items()}, coords)

    groups = {
        "posterior_predictive": each([labels for labels, _ in chains]),
        "prior_predictive": each([prior[0]]),
        "constant_data": given(text=np.array(examples.texts, dtype=object)),
    }
    if examples.labels is not None:
        groups["log_likelihood"] = each([fit for _, fit in chains if fit is not None])
        groups["observed_data"] = given(label=examples.labels.numpy())
    return groups


def _outcome(
    model: Model, guide: Callable[..., Any], feed: Feed, samples: int, seed: int
) -> tuple[Tensor, Tensor | None]:
    """(S, N) labels, and log-likelihoods if the examples are labelled."""
    with seeded(seed):
        parts = [*passes(model, drawn(model, guide, samples, seed), feed, _take)]
    predicted, *fit = (torch.cat(part) for part in zip(*parts, strict=True))
    if model.likelihood.kind != "rating":
        predicted = predicted.long()
    return predicted, fit[0] if fit else None


def _take(distribution: TorchDistribution, labels: Tensor | None) -> Sequence[Tensor]:
    sample = distribution.sample()
    return (sample,) if labels is None else (sample, distribution.log_prob(labels))
