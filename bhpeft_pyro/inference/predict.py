"""From weight draws to a forecast: S draws folded into batches of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Normal
from torch.nn import functional

from ..batch import Batch
from ..data import Examples
from ..distributions import base_of
from ..errors import ConfigError
from ..forecast import ClassAccumulator, ClassForecast, RatingForecast
from ..guides import Guide
from ..linear import linear_predictive
from ..model import Model
from .draws import blocks, draw, point, strata
from .feed import Feed

__all__ = ["AnyForecast", "outcomes", "predict"]

AnyForecast = ClassForecast | RatingForecast
# A number of draws, and the distribution of a batch's labels under them.
_Pass = tuple[int, Callable[[Batch], TorchDistribution]]
# What is wanted of it, given a batch's labels.
_Take = Callable[[TorchDistribution, Tensor | None], Sequence[Tensor]]

_BATCH = 32  # examples per pass when a single draw is run


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
    (`linear.linear_predictive`) a pass is for all draws.

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
    feed = data if isinstance(data, Feed) else Feed(model, data)
    examples = feed.examples
    rating = model.likelihood.kind == "rating"
    take = _moments if rating else _probabilities
    parts = outcomes(
        model, guide, feed, samples, take, max_rows=max_rows, seed=seed, bf16=bf16, linear=linear
    )
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


def outcomes(
    model: Model,
    guide: Callable[..., object],
    feed: Feed,
    samples: int,
    take: _Take,
    *,
    max_rows: int = 64,
    seed: int = 0,
    bf16: bool = False,
    linear: bool | None = None,
) -> Iterator[tuple[Tensor, ...]]:
    """What is wanted of the labels' distribution under each draw, some draws at a time.

    Args:
        take: from a distribution of batch shape (s, B), and the labels (B,) if there are any, to
            tensors (s, B, ...).
        model, guide, samples, max_rows, seed, bf16, linear: as for `predict`.

    Yields:
        Tensors (s, N, ...) on the CPU, in the examples' order.
    """
    if samples < 0:
        raise ConfigError(f"samples={samples} must be 0 or more")
    if max_rows < 1:
        raise ConfigError(f"max_rows={max_rows} must be at least 1")
    examples = feed.examples
    choices = 1 if examples.counts is None else int(examples.counts.max())
    batch_size = max(1, min(_BATCH, len(examples), max_rows // choices))
    together = max(1, min(samples, max_rows // (batch_size * choices)))
    if linear is None:
        linear = isinstance(guide, Guide) and guide.linear
    passes = (
        _linear_passes(model, guide, samples, seed)
        if linear and samples and model.network.kinds
        else _passes(model, guide, samples, together, seed)
    )
    for draws, predictive in passes:
        yield _run(model, predictive, draws, feed, batch_size, bf16, take)


def _moments(distribution: TorchDistribution, labels: Tensor | None) -> Sequence[Tensor]:
    moments = distribution.mean, distribution.stddev
    if labels is None or isinstance(base_of(distribution), Normal):  # the moments say it all
        return moments
    return *moments, distribution.log_prob(labels)


def _probabilities(distribution: TorchDistribution, labels: Tensor | None) -> Sequence[Tensor]:
    return (distribution.probs,)


def _passes(
    model: Model, guide: Callable[..., object], samples: int, together: int, seed: int
) -> Iterator[_Pass]:
    """The draws, at most `together` at a time; which draws they are does not depend on it."""
    if samples == 0:
        for component, _ in strata(guide, 0):
            yield 1, partial(model.predictive, point(model, component))
        return
    for block in blocks(model, guide, samples, seed):
        count = len(next(iter(block.values())))
        for start in range(0, count, together):
            weights = {name: value[start : start + together] for name, value in block.items()}
            yield min(together, count - start), partial(model.predictive, weights)


def _linear_passes(
    model: Model, guide: Callable[..., object], samples: int, seed: int
) -> Iterator[_Pass]:
    draws = draw(model, guide, samples, seed)
    for number, (component, share) in enumerate(strata(guide, samples)):
        at = {name: value[0, 0] for name, value in point(model, component).items()}
        own = {name: value.split(share)[number] for name, value in draws.items()}
        yield share, linear_predictive(model, at, own)


def _run(
    model: Model,
    predictive: Callable[[Batch], TorchDistribution],
    draws: int,
    feed: Feed,
    batch_size: int,
    bf16: bool,
    take: _Take,
) -> tuple[Tensor, ...]:
    device = model.network.device
    order: list[Tensor] = []
    parts: list[list[Tensor]] = []
    for indices, batch in feed.prediction(batch_size):
        shown = batch.to(device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            distribution = predictive(shown).expand(torch.Size((draws, len(indices))))
        parts.append([value.float().cpu() for value in take(distribution, shown.labels)])
        order.append(indices)
    back = torch.cat(order).argsort()
    return tuple(_joined(values)[:, back] for values in zip(*parts, strict=True))


def _joined(values: Sequence[Tensor]) -> Tensor:
    """Batches (s, B, ...), which under multiple choice differ in their width, as one."""
    if values[0].dim() == 3:
        width = max(value.shape[-1] for value in values)
        values = [functional.pad(value, (0, width - value.shape[-1])) for value in values]
    return torch.cat([*values], 1)
