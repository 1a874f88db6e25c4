"""From weight draws to a forecast: S draws folded into batches of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Normal

from ..data import Examples
from ..data.batch import Batch
from ..distributions import base_of
from ..errors import ConfigError
from ..forecast import ClassForecast, RatingForecast
from ..guides import Guide
from ..guides.guide import components_of, is_linear
from ..model.linearized import output_moments, symmetric_noise
from ..model.model import Model
from .draws import drawing, strata
from .passes import Feed, by_batch, drawn, passes

__all__ = ["AnyForecast", "predict"]

_WEIGHTS, _OUTPUTS = 32, 1000  # draws by default

AnyForecast = ClassForecast | RatingForecast


def predict(
    model: Model,
    guide: Callable[..., object],
    data: Examples | Feed,
    samples: int | None = None,
    *,
    max_rows: int = 64,
    seed: int = 0,
    keep_samples: bool = False,
    bf16: bool = False,
) -> AnyForecast:
    """The posterior predictive of every example.

    Under a guide of the linearised network no weight is drawn: its outputs are Normal, in closed
    form (`linear.output_moments`). Ratings with a Normal likelihood are then a mixture of Normals,
    one a component; of other labels the outputs of each example are drawn, at no cost.

    Under others, and where draws are to be kept, all examples see the same S draws of the weights,
    those of `draw`, several a pass: the transformer runs on at most `max_rows` sequences at once.

    Args:
        model: the model.
        guide: the fitted guide.
        data: the examples.
        samples: S, rounded up to as many for each component of a mixture; 0 for a single pass
            at the guide's central values, or at those of each component. By default 32 draws of
            the weights, or 1,000 of the outputs.
        max_rows: bounds memory.
        seed: the same seed gives the same forecast.
        keep_samples: draw weights, and keep what each draw predicts, (S, N, C) or (S, N).
        bf16: autocast to bfloat16.
    """
    if samples is not None and (not hasattr(samples, "__index__") or samples < 0):
        raise ConfigError(f"samples={samples!r} must be an integer of 0 or more")
    if max_rows < 1:
        raise ConfigError(f"max_rows={max_rows} must be at least 1")
    feed = data if isinstance(data, Feed) else Feed(model, data)
    closed = all(is_linear(each) and each.covariance is not None for each in components_of(guide))
    if closed and not keep_samples and samples != 0:
        count = _OUTPUTS if samples is None else samples
        return _in_closed_form(model, guide, feed, count, max_rows, seed, bf16)
    samples = _WEIGHTS if samples is None else samples
    rating = model.likelihood.kind == "rating"
    take = _moments if rating else _probabilities
    draws = drawn(model, guide, samples, seed)
    parts = passes(model, draws, feed, take, rows=max_rows, bf16=bf16)
    if rating:
        means, sds, *densities = (torch.cat(part) for part in zip(*parts, strict=True))
        labels, texts = feed.examples.labels, feed.examples.texts
        return RatingForecast.from_draws(
            means, sds, labels=labels, texts=texts, densities=densities[0] if densities else None
        )
    return ClassForecast.from_draws(
        torch.cat([probabilities for (probabilities,) in parts]),
        keep_samples=keep_samples,
        **_of_examples(feed.examples),
    )


def _in_closed_form(
    model: Model,
    guide: Callable[..., object],
    feed: Feed,
    samples: int,
    max_rows: int,
    seed: int,
    bf16: bool,
) -> AnyForecast:
    """By the moments of the linearised network's outputs, component by component."""
    examples, likelihood = feed.examples, model.likelihood
    width = model.network.outputs
    if examples.counts is not None:
        width *= int(examples.counts.max())
    ratings: list[tuple[Tensor, ...]] = []
    classes: list[ClassForecast] = []
    for number, (component, share) in enumerate(strata(guide, samples)):
        assert isinstance(component, Guide)
        with drawing(seed + number):  # the same for every example, so batches do not matter
            own = sum(site.numel for site in likelihood.sites)
            noise = symmetric_noise(share, own + width).to(model.network.device)
        take = partial(_read, model, component, noise)
        values = by_batch(model, feed, take, rows=max_rows, bf16=bf16)
        if likelihood.kind == "rating":
            ratings.append(values)
        else:
            classes.append(ClassForecast.from_draws(values[0], **_of_examples(examples)))
    if classes:
        return ClassForecast.mixed(classes)
    means, sds, *more = (torch.cat(part) for part in zip(*ratings, strict=True))
    what = "within" if likelihood.constant_noise else "densities"
    given = {what: more[0]} if more else {}
    return RatingForecast.from_draws(
        means, sds, labels=examples.labels, texts=examples.texts, **given
    )


def _read(model: Model, guide: Guide, noise: Tensor, batch: Batch) -> Sequence[Tensor]:
    """What one component says of a batch: tensors (S, B, ...)."""
    assert guide.covariance is not None
    outputs, covariance = output_moments(model, guide.means(), guide.covariance, batch)
    if model.likelihood.constant_noise:
        center = outputs.labels(outputs.mean)
        return center.mean[None], center.stddev[None], outputs.mean_variance(covariance)[None]
    distribution = outputs.labels(outputs.draws(covariance, noise))
    if model.likelihood.kind == "rating":
        return _moments(distribution, batch.labels)
    return _probabilities(distribution, batch.labels)


def _of_examples(examples: Examples) -> dict[str, Any]:
    """What a forecast of classes has of the examples themselves."""
    exist = None
    if examples.counts is not None:
        exist = torch.arange(int(examples.counts.max())) < examples.counts.unsqueeze(-1)
    return {
        "labels": examples.labels,
        "texts": examples.texts,
        "label_names": examples.label_names,
        "choices": exist,
    }


def _moments(distribution: TorchDistribution, labels: Tensor | None) -> Sequence[Tensor]:
    moments = distribution.mean.float(), distribution.stddev.float()
    if labels is None or isinstance(base_of(distribution), Normal):  # the moments say it all
        return moments
    return *moments, distribution.log_prob(labels).float()


def _probabilities(distribution: TorchDistribution, labels: Tensor | None) -> Sequence[Tensor]:
    return (distribution.probs.float(),)
