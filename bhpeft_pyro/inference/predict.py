"""From weight draws to a forecast: S draws folded into batches of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Normal

from ..data import Examples
from ..distributions import base_of
from ..errors import ConfigError
from ..forecast import ClassAccumulator, ClassForecast, RatingForecast
from ..model import Model
from .feed import Feed
from .passes import drawn, passes

__all__ = ["AnyForecast", "predict"]

AnyForecast = ClassForecast | RatingForecast


def predict(
    model: Model,
    guide: Callable[..., object],
    data: Examples | Feed,
    samples: int = 32,
    *,
    max_rows: int = 64,
    seed: int = 0,
    keep_samples: bool = False,
    bf16: bool = False,
    linear: bool | None = None,
) -> AnyForecast:
    """The posterior predictive of every example.

    All examples see the same S draws of the weights, those of `draw`, several a pass: the
    transformer runs on at most `max_rows` sequences at once. In the linearised network
    (`linear.linear_predictives`) a pass is for all draws, or as many as `linear.MAX_BYTES` hold.

    Args:
        model: the model.
        guide: the fitted guide.
        data: the examples.
        samples: S, rounded up to as many for each component of a mixture; 0 for a single pass
            at the guide's central values, or at those of each component.
        max_rows: bounds memory.
        seed: the same seed gives the same forecast.
        keep_samples: keep what each draw predicts, (S, N, C) or (S, N).
        bf16: autocast to bfloat16.
        linear: predict with the network linearised around the guide's central values, at once
            under all draws; by default where the guide was fitted so.
    """
    if not hasattr(samples, "__index__") or samples < 0:
        raise ConfigError(f"samples={samples!r} must be an integer of 0 or more")
    if max_rows < 1:
        raise ConfigError(f"max_rows={max_rows} must be at least 1")
    feed = data if isinstance(data, Feed) else Feed(model, data)
    examples = feed.examples
    rating = model.likelihood.kind == "rating"
    take = _moments if rating else _probabilities
    draws = drawn(model, guide, samples, seed, linear)
    parts = passes(model, draws, feed, take, rows=max_rows, bf16=bf16)
    if rating:
        means, sds, *densities = (torch.cat(part) for part in zip(*parts, strict=True))
        return RatingForecast.from_draws(
            means,
            sds,
            labels=examples.labels,
            texts=examples.texts,
            densities=densities[0] if densities else None,
        )
    accumulator = ClassAccumulator(keep_samples=keep_samples)
    for (probabilities,) in parts:
        accumulator.add(probabilities)
    exist = None
    if examples.counts is not None:
        exist = torch.arange(int(examples.counts.max())) < examples.counts.unsqueeze(-1)
    return accumulator.forecast(
        labels=examples.labels,
        texts=examples.texts,
        label_names=examples.label_names,
        choices=exist,
    )


def _moments(distribution: TorchDistribution, labels: Tensor | None) -> Sequence[Tensor]:
    moments = distribution.mean.float(), distribution.stddev.float()
    if labels is None or isinstance(base_of(distribution), Normal):  # the moments say it all
        return moments
    return *moments, distribution.log_prob(labels).float()


def _probabilities(distribution: TorchDistribution, labels: Tensor | None) -> Sequence[Tensor]:
    return (distribution.probs.float(),)
