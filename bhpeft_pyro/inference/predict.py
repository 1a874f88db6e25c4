"""From weight draws to a forecast: S draws folded into batches of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from ..data import Examples
from ..errors import ConfigError
from ..forecast import ClassAccumulator, ClassForecast, RatingForecast
from ..model import Model
from .draws import blocks, point
from .feed import Feed

__all__ = ["AnyForecast", "predict"]

AnyForecast = ClassForecast | RatingForecast

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
) -> AnyForecast:
    """The posterior predictive of every example.

    All examples see the same S draws of the weights, those of `draw`, several a pass: the
    transformer runs on at most `max_rows` sequences at once.

    Args:
        model: the model.
        guide: the fitted guide.
        data: the examples.
        samples: S; 0 for a single pass at the guide's central values.
        max_rows: bounds memory.
        seed: the same seed gives the same forecast.
        keep_samples: keep what each draw predicts, (S, N, C) or (S, N).
        bf16: autocast to bfloat16.
    """
    if samples < 0:
        raise ConfigError(f"samples={samples} must be 0 or more")
    if max_rows < 1:
        raise ConfigError(f"max_rows={max_rows} must be at least 1")
    feed = data if isinstance(data, Feed) else Feed(model, data)
    examples = feed.examples
    choices = 1 if examples.counts is None else int(examples.counts.max())
    batch_size = max(1, min(_BATCH, len(examples), max_rows // choices))
    together = max(1, min(samples, max_rows // (batch_size * choices)))
    accumulator = ClassAccumulator(keep_samples=keep_samples)
    means: list[Tensor] = []
    sds: list[Tensor] = []
    for weights in _passes(model, guide, samples, together, seed):
        outcome = _run(model, weights, feed, batch_size, bf16)
        if model.likelihood.kind == "rating":
            means.append(outcome[0])
            sds.append(outcome[1])
        else:
            accumulator.add(outcome[0])
    if model.likelihood.kind == "rating":
        return RatingForecast.from_draws(
            torch.cat(means), torch.cat(sds), labels=examples.labels, texts=examples.texts
        )
    exist = None
    if examples.counts is not None:
        exist = torch.arange(choices) < examples.counts.unsqueeze(-1)
    return accumulator.forecast(
        labels=examples.labels,
        texts=examples.texts,
        label_names=examples.label_names,
        choices=exist,
    )


def _passes(
    model: Model, guide: Callable[..., object], samples: int, together: int, seed: int
) -> Iterator[dict[str, Tensor]]:
    """The draws, at most `together` at a time; which draws they are does not depend on it."""
    if samples == 0:
        yield point(model, guide)
        return
    for block in blocks(model, guide, samples, seed):
        count = len(next(iter(block.values())))
        for start in range(0, count, together):
            yield {name: value[start : start + together] for name, value in block.items()}


def _run(
    model: Model, weights: Mapping[str, Tensor], feed: Feed, batch_size: int, bf16: bool
) -> tuple[Tensor, ...]:
    """(S, N, C) probabilities, or (S, N) means and sds, in the examples' order."""
    device = model.network.device
    draws = len(next(iter(weights.values())))
    order: list[Tensor] = []
    parts: list[tuple[Tensor, ...]] = []
    width = 0
    for indices, batch in feed.prediction(batch_size):
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            distribution = model.predictive(weights, batch.to(device))
        if model.likelihood.kind == "rating":
            part = [distribution.mean, distribution.stddev]
        else:
            part = [distribution.probs]
            width = max(width, part[0].shape[-1])
        parts.append(tuple(value.float().cpu().expand(draws, *value.shape[1:]) for value in part))
        order.append(indices)
    back = torch.cat(order).argsort()
    if width:
        parts = [(functional.pad(p, (0, width - p.shape[-1])),) for (p,) in parts]
    return tuple(torch.cat(values, 1)[:, back] for values in zip(*parts, strict=True))
