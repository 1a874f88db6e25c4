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
from ..diagnostics.passes import max_rows
from ..inference.draws import seeded
from ..inference.feed import Feed
from ..inference.predict import outcomes
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
    with seeded(seed):
        parts = list(
            outcomes(model, guide, feed, samples, _drawn, max_rows=max_rows(feed), seed=seed)
        )
    predicted, *fit = (torch.cat(part) for part in zip(*parts, strict=True))
    if model.likelihood.kind != "rating":
        predicted = predicted.long()
    return predicted, fit[0] if fit else None


def _drawn(distribution: TorchDistribution, labels: Tensor | None) -> Sequence[Tensor]:
    drawn = distribution.sample()
    return (drawn,) if labels is None else (drawn, distribution.log_prob(labels))
