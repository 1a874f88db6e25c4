"""What weight draws predict, and how probable they make the labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ..inference.feed import Feed
from ..inference.passes import Block, passes
from ..model import Model

__all__ = ["Outcome", "labels", "run"]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What S draws say of N examples, in float64.

    Attributes:
        predictions: (S, N, K) class probabilities, or (S, N, 1) means of ratings.
        log_likelihood: (S,) log p(labels | weights) of the whole data set; None without labels.
    """

    predictions: Tensor
    log_likelihood: Tensor | None


def run(model: Model, draws: Iterable[Block], feed: Feed) -> Outcome:
    """Predict every example of a feed under each of the draws."""
    rating = model.likelihood.kind == "rating"

    def take(distribution: TorchDistribution, known: Tensor | None) -> Sequence[Tensor]:
        values = distribution.mean.unsqueeze(-1) if rating else distribution.probs
        return (values,) if known is None else (values, distribution.log_prob(known))

    parts = passes(model, draws, feed, take)
    predictions, *log_prob = (torch.cat(part).double() for part in zip(*parts, strict=True))
    return Outcome(predictions, log_prob[0].sum(-1) if log_prob else None)


def labels(model: Model, draws: Iterable[Block], feed: Feed) -> Tensor:
    """(S, N) labels: one set drawn from the likelihood under each of the draws."""
    kind = torch.float32 if model.likelihood.kind == "rating" else torch.int64
    parts = passes(model, draws, feed, lambda distribution, _: (distribution.sample().to(kind),))
    return torch.cat([part for (part,) in parts])
