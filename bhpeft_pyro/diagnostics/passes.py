"""What given weight draws predict, and how probable they make the labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.nn import functional

from ..inference.feed import Feed
from ..model import Model

__all__ = ["Outcome", "labels", "max_rows", "prior_guide", "run"]

_BATCH = 32  # examples per pass of the transformer
_MAX_ROWS = 64  # sequences at once in the transformer, as in `predict`
_MAX_FEATURES = 2**16  # the same where features have been computed already


@dataclass(frozen=True, eq=False)
class Outcome:
    """What S draws say of N examples, in float64.

    Attributes:
        predictions: (S, N, K) class probabilities, or (S, N, 1) means of ratings.
        log_likelihood: (S,) log p(labels | weights) of the whole data set; None without labels.
    """

    predictions: Tensor
    log_likelihood: Tensor | None


def run(model: Model, weights: Mapping[str, Tensor], feed: Feed) -> Outcome:
    """Predict every example of a feed under (S, 1, *shape) weights."""
    draws = len(next(iter(weights.values())))
    known = feed.examples.labels
    likelihood = torch.zeros(draws, dtype=torch.float64)
    predictions = torch.zeros(draws, len(feed.examples), 0, dtype=torch.float64)
    for chosen, indices, distribution in _passes(model, weights, feed):
        rating = model.likelihood.kind == "rating"
        values = distribution.mean.unsqueeze(-1) if rating else distribution.probs
        missing = values.shape[-1] - predictions.shape[-1]
        if missing > 0:  # batches of multiple choice differ in their width
            predictions = functional.pad(predictions, (0, missing))
        rows = torch.arange(chosen.start, chosen.stop)
        predictions[rows[:, None], indices, : values.shape[-1]] = values.double().cpu()
        if known is not None:
            log_prob = distribution.log_prob(known[indices].to(values.device))
            likelihood[chosen] += log_prob.double().sum(-1).cpu()
    return Outcome(predictions, None if known is None else likelihood)


def labels(model: Model, weights: Mapping[str, Tensor], feed: Feed) -> Tensor:
    """(S, N) labels: one set drawn from the likelihood under each of (S, 1, *shape) weights."""
    shape = (len(next(iter(weights.values()))), len(feed.examples))
    kind = torch.float32 if model.likelihood.kind == "rating" else torch.int64
    found = torch.zeros(shape, dtype=kind)
    for chosen, indices, distribution in _passes(model, weights, feed):
        rows = torch.arange(chosen.start, chosen.stop)
        found[rows[:, None], indices] = distribution.sample().to("cpu", kind)
    return found


def prior_guide(model: Model) -> Callable[[object], Mapping[str, Tensor]]:
    """A model's prior in the form of a guide, to draw from and to predict with."""
    return lambda _batch: model.prior(model.sites)


def max_rows(feed: Feed) -> int:
    """How many sequences to run at once: few in the transformer, many where it is done."""
    return _MAX_ROWS if feed.features is None else _MAX_FEATURES


def _passes(
    model: Model, weights: Mapping[str, Tensor], feed: Feed
) -> Iterator[tuple[slice, Tensor, TorchDistribution]]:
    """Some draws, the indices of some examples, and their labels' distribution, (draws, B)."""
    device = model.network.device
    draws, count = len(next(iter(weights.values()))), len(feed.examples)
    choices = 1 if feed.examples.counts is None else int(feed.examples.counts.max())
    limit = max_rows(feed)
    batch = max(1, min(_BATCH if feed.features is None else limit, count, limit // choices))
    together = max(1, min(draws, limit // (batch * choices)))
    for start in range(0, draws, together):
        chosen = slice(start, min(start + together, draws))
        part = {name: value[chosen] for name, value in weights.items()}
        for indices, examples in feed.prediction(batch):
            with torch.no_grad():
                distribution = model.predictive(part, examples.to(device))
            wide = torch.Size((chosen.stop - chosen.start, len(indices)))
            yield chosen, indices, distribution.expand(wide)
