"""From a posterior to a forecast, in closed form or by draws."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Normal

from ..checks import COUNT, SEED, Number, boolean, check_memory
from ..data import Examples
from ..data.batch import Batch
from ..distributions import base_of
from ..errors import LikelihoodError
from ..forecast import ClassForecast, LabelsForecast, RatingForecast
from ..guides import Guide
from ..guides.budget import examples_at_once
from ..guides.guide import components_of, is_linear
from ..model.linearized import output_moments, symmetric_noise
from ..model.model import Model
from .draws import drawing, strata
from .passes import Block, Feed, Take, by_batch, drawn, passes

__all__ = ["AnyForecast", "predict", "simulate"]

_WEIGHTS, _OUTPUTS = 32, 1000  # draws by default
_OUTCOMES = 1000  # labels drawn for each example, at least, where they are not Normal
_DRAWN = 28  # bytes of such a label in float32, and of those in float64 and int64 that sort it
_BYTES = 12  # a number in float32 that a draw predicts, and two copies while they are put together

AnyForecast = ClassForecast | LabelsForecast | RatingForecast


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

    For a guide of the linearised network the outputs are Normal in closed form
    (`linearized.output_moments`), and no weights are drawn. Ratings with a Normal likelihood are
    then a mixture of Normals, one per component. For other labels the outputs of each example are
    drawn, at almost no cost.

    For other guides, and to keep draws, all examples see the same S draws of the weights, those of
    `draw`.

    Args:
        model: the model.
        guide: the fitted guide.
        data: N examples.
        samples: S, rounded up to equally many for each component of a mixture; 0 for a single pass
            at the central values of each component. By default 32 draws of the weights, or 1,000 of
            the outputs.
        max_rows: the largest number of sequences per pass of the transformer; bounds memory.
        seed: the same seed gives the same forecast.
        keep_samples: draw weights, and keep the prediction of each draw: `(S, N, C)` probabilities
            of classes or labels, or `(S, N)` means of ratings.
        bf16: autocast to bfloat16.

    Raises:
        ConfigError: an argument is out of range, or there is no memory for so many draws.
        DataError: the backbone makes non-finite numbers of a text.
        GuideError: `samples` is 0 and the guide has no central values.
        LikelihoodError: the likelihood's distribution has no finite mean and stddev.
    """
    samples = Number(least=0, whole=True, none=True)("samples", samples)
    max_rows, seed = COUNT("max_rows", max_rows), SEED("seed", seed)
    keep_samples, bf16 = boolean("keep_samples", keep_samples), boolean("bf16", bf16)
    examples = data.examples if isinstance(data, Feed) else data
    width = model.network.outputs * examples.width
    check_memory("samples", samples or 0, _BYTES * len(examples) * width)
    feed = data if isinstance(data, Feed) else Feed(model, data)
    closed = all(is_linear(each) and each.covariance is not None for each in components_of(guide))
    if closed and not keep_samples and samples != 0:
        count = _OUTPUTS if samples is None else samples
        return _in_closed_form(model, guide, feed, count, max_rows, seed, bf16)
    samples = _WEIGHTS if samples is None else samples
    take = _quantities(model, samples, seed, len(examples))
    draws = drawn(model, guide, samples, seed)
    parts = zip(*passes(model, draws, feed, take, rows=max_rows, bf16=bf16), strict=True)
    values = [torch.cat(part) for part in parts]
    if model.likelihood.kind == "rating":
        return _ratings(values, examples)
    return _classes(values[0], examples, keep_samples)


def _in_closed_form(
    model: Model,
    guide: Callable[..., object],
    feed: Feed,
    samples: int,
    max_rows: int,
    seed: int,
    bf16: bool,
) -> AnyForecast:
    """From the moments of the linearised network's outputs, component by component."""
    examples, likelihood = feed.examples, model.likelihood
    width = model.network.outputs * examples.width
    ratings: list[tuple[Tensor, ...]] = []
    classes: list[Any] = []
    draw = _quantities(model, samples, seed, len(examples))
    latents = sum(site.numel for site in model.sites)
    rows = min(max_rows, examples.width * examples_at_once(latents, width, max_rows))
    for number, (component, share) in enumerate(strata(guide, samples)):
        assert isinstance(component, Guide)
        with drawing(seed + number):  # the same for every example, whatever its batch
            own = sum(site.numel for site in likelihood.sites)
            noise = symmetric_noise(share, own + width).to(model.network.device)
        take = partial(_read, model, component, noise, draw)
        values = by_batch(model, feed, take, rows=rows, bf16=bf16)
        if likelihood.kind == "rating":
            ratings.append(values)
        else:
            classes.append(_classes(values[0], examples))
    if classes:
        mixed: AnyForecast = type(classes[0]).mixed(classes)
        return mixed
    joined = [torch.cat(part) for part in zip(*ratings, strict=True)]
    if not likelihood.constant_noise:
        return _ratings(joined, examples)
    means, sds, within = joined
    return RatingForecast.from_draws(
        means, sds, within=within, labels=examples.labels, texts=examples.texts
    )


def _read(model: Model, guide: Guide, noise: Tensor, draw: Take, batch: Batch) -> Sequence[Tensor]:
    """The prediction of one component for a batch: tensors (S, B, ...)."""
    assert guide.covariance is not None
    outputs, covariance = output_moments(model, guide.means(), guide.covariance, batch)
    if model.likelihood.constant_noise:
        center = outputs.labels(outputs.mean)
        return center.mean[None], center.stddev[None], outputs.mean_variance(covariance)[None]
    return draw(outputs.labels(outputs.draws(covariance, noise)), batch.labels)


def _classes(
    probabilities: Tensor, examples: Examples, keep_samples: bool = False
) -> ClassForecast | LabelsForecast:
    given: dict[str, Any] = {
        "labels": examples.labels,
        "texts": examples.texts,
        "label_names": examples.label_names,
        "keep_samples": keep_samples,
    }
    if examples.kind == "labels":
        return LabelsForecast.from_draws(probabilities, **given)
    return ClassForecast.from_draws(probabilities, choices=examples.choices, **given)


def _ratings(values: Sequence[Tensor], examples: Examples) -> RatingForecast:
    """From means and sds, and from outcomes and densities if there are any."""
    means, sds, *more = values
    names = ("outcomes", "densities")
    given: dict[str, Any] = dict(zip(names, more, strict=False))
    return RatingForecast.from_draws(
        means, sds, labels=examples.labels, texts=examples.texts, **given
    )


def _probabilities(distribution: TorchDistribution, labels: Tensor | None) -> Sequence[Tensor]:
    base: Any = base_of(distribution)
    return (base.probs.float(),)


def _quantities(model: Model, samples: int, seed: int, rows: int) -> Take:
    """What a forecast of so many rows needs of the labels' distribution under each of `samples`
    draws."""
    if model.likelihood.kind != "rating":
        return _probabilities
    seeds = torch.Generator().manual_seed(seed)
    each = -(-_OUTCOMES // max(samples, 1))

    def moments(distribution: TorchDistribution, labels: Tensor | None) -> Sequence[Tensor]:
        base = base_of(distribution)
        try:
            mean, sd = distribution.mean.float(), distribution.stddev.float()
        except NotImplementedError:
            mean = sd = torch.tensor(torch.nan)
        if isinstance(base, Normal):  # the moments are enough
            return mean, sd
        check_memory("data: rows", rows, _DRAWN * each * max(samples, 1))
        with drawing(int(torch.randint(2**62, (), generator=seeds))):
            outcomes = distribution.sample(torch.Size((each,))).movedim(0, -1).float()
        finite = (mean + sd).isfinite().all()
        if not finite and distribution.log_prob(outcomes[..., 0]).isfinite().all():
            raise LikelihoodError(
                f"{type(model.likelihood).__name__}: the mean and stddev of its "
                f"{type(base).__name__} are not finite; expected a distribution that has both"
            )
        if labels is None:
            return mean, sd, outcomes
        return mean, sd, outcomes, distribution.log_prob(labels).float()

    return moments


def simulate(model: Model, draws: Iterable[Block], feed: Feed) -> list[Tensor]:
    """Labels drawn from the likelihood, one set of them under each of S draws of the weights.

    Args:
        model, draws: as for `passes`.
        feed: N examples.

    Returns:
        (S, N) labels of the examples' own type, (S, N, K) if a text has several; and, if the
        examples have labels, the (S, N) log density of these.
    """
    kind = torch.int64 if model.likelihood.kind in ("class", "choice") else torch.float32

    def take(predicted: TorchDistribution, labels: Tensor | None) -> Sequence[Tensor]:
        sample = predicted.sample().to(kind)
        return (sample,) if labels is None else (sample, predicted.log_prob(labels))

    return [torch.cat(part) for part in zip(*passes(model, draws, feed, take), strict=True)]
