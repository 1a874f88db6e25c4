"""From a posterior to a forecast, in closed form or by draws."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Bernoulli, Normal

from ..base.distributions import base_of
from ..base.isolation import seeded
from ..base.names import Method
from ..base.progress import work
from ..base.values import Amount, Count, Seed, checked_call, derived
from ..data import Examples
from ..data.batch import Batch
from ..data.columns import MAX_CHOICES
from ..errors import ConfigError, DataError, LikelihoodError
from ..forecast import ClassForecast, LabelsForecast, RatingForecast
from ..guides import Guide
from ..guides.guide import guides_of
from ..model.cached_batches import BATCH, CachedBatches, check_all
from ..model.linearized import (
    examples_at_once,
    jacobian,
    linear_parts,
    normal_points,
)
from ..model.model import Model
from .draws import TOGETHER, Draws, Statistics, by_batch, draw_parts, passes, strata

PART = 1024
"""Examples that are predicted together: it bounds the memory that their draws take."""

_WEIGHTS, _OUTPUTS = 32, 1000  # draws by default
_OUTCOMES = 1000  # labels drawn for each example, at least, where they are not Normal

AnyForecast = ClassForecast | LabelsForecast | RatingForecast


@checked_call
def predict(
    model: Model,
    guide: Guide | Sequence[Guide],
    data: Examples | CachedBatches,
    samples: Amount | None = None,
    *,
    method: Method | None = None,
    max_rows: Count = 64,
    seed: Seed = 0,
    keep_samples: bool = False,
    bf16: bool = False,
) -> AnyForecast:
    """The posterior predictive of N examples under one guide, or the mixture of several with equal
    weights; arguments and errors as for `Posterior.predict`.

    For a guide of the linearised network the outputs are Normal, and no weights are drawn. Their
    covariance is J S J' (`linearized.jacobian`). Ratings with a Normal likelihood are then a
    mixture of Normals, one per component, each with the noise of its central weights. For other
    labels the outputs of each example are drawn, at almost no cost.

    For other guides, and to keep draws, all examples see the same S draws of the weights, those of
    `draw`.
    """
    examples = data.examples if isinstance(data, CachedBatches) else data
    guides = guides_of(guide)
    closed = in_closed_form(guides, method, drawn=keep_samples or samples == 0)
    count = (_OUTPUTS if closed else _WEIGHTS) if samples is None else samples
    choices = 1.0 if examples.counts is None else examples.counts.double().mean().item()
    cost = _passes(model, guides, closed, count, model.network.outputs * choices)

    def runs(batches: CachedBatches, done: Callable[[], object]) -> Iterator[Sequence[Tensor]]:
        """What each component predicts, tensors (S, N, ...): from the moments of the linearised
        network's outputs, or by "draws" of the weights, those of `draw`."""
        statistics, examples = _statistics(model, count, seed), batches.examples
        width = model.network.outputs * examples.width
        latents, of_likelihood = (
            sum(s.numel for s in of.sites) for of in (model, model.likelihood)
        )
        most = max(1, min(BATCH, max_rows // examples.width))
        size = examples_at_once(latents, width, most) if closed else most
        # For as many choices as there may be: noise of another shape has other values.
        normals = width if examples.choices is None else MAX_CHOICES * model.network.outputs
        seeds = torch.Generator().manual_seed(seed)
        values: Sequence[Tensor]
        for number, (component, share) in enumerate(strata(guides, count)):
            if not closed:
                draws, parts = draw_parts(model, component, share, seeds), []
                with work(parts=share) as drawn:
                    for part in passes(model, draws, batches, statistics, rows=max_rows, bf16=bf16):
                        parts.append(part)
                        drawn.next(parts=len(part[0]))
                values = [torch.cat(column) for column in zip(*parts, strict=True)]
            else:
                # The same for every example, so that no batch makes another forecast.
                noise = normal_points(share, of_likelihood + normals, derived(seed, number))
                noise = noise.to(model.network.device)
                read = partial(_read, model, component, noise, statistics)
                values = by_batch(model, batches, read, size=size, bf16=bf16)
            done()
            yield values

    def forecast(batches: CachedBatches, done: Callable[[], object]) -> AnyForecast:
        made: AnyForecast
        known: dict[str, Any] = known_of(batches.examples)
        if model.likelihood.kind == "rating":
            columns = zip(*runs(batches, done), strict=True)
            means, sds, *more = (torch.cat(column) for column in columns)
            exact = closed and model.likelihood.linear_mean
            names = ("within",) if exact else ("outcomes", "densities")
            known |= dict(zip(names, more, strict=False))
            known |= {"scale": model.likelihood.label_range, "components": len(guides)}
            made = RatingForecast.from_draws(means, sds, **known)
        else:
            kind = LabelsForecast if model.likelihood.kind == "labels" else ClassForecast
            known |= {"keep_samples": keep_samples}
            each: list[Any] = [kind.from_draws(p, **known) for (p,) in runs(batches, done)]
            made = kind.mixed(each)
        how = ("exact" if closed else "draws") if count else "point"
        return replace(made, method=how, passes=cost)

    if isinstance(data, CachedBatches):
        with work("predicting", len(guides)) as whole:
            return forecast(data, whole.next)
    return in_parts(
        model, data, lambda part, done: forecast(CachedBatches(model, part), done), len(guides)
    )


def in_parts(
    model: Model,
    examples: Examples,
    of_part: Callable[[Examples, Callable[[], object]], AnyForecast],
    steps: int = 1,
) -> AnyForecast:
    """The forecast of N examples from those of a `PART` of them at a time, each of which calls its
    second argument after each of so many `steps`."""
    pieces = torch.arange(len(examples)).split(PART)
    with work("predicting", len(pieces) * steps) as whole:
        try:
            parts: list[Any] = [
                of_part(examples if len(pieces) == 1 else examples.subset(at), whole.next)
                for at in pieces
            ]
        except DataError as error:
            if error.rows and len(pieces) > 1:  # which are counted from the part's first
                check_all(model, data=examples)
            raise
    joined: AnyForecast = type(parts[0]).joined(parts)
    return joined


def in_closed_form(guides: Sequence[Guide], method: Method | None, drawn: bool) -> bool:
    """Whether to predict without draws of the weights: if nothing asks for draws, and all guides
    have a covariance of the linearised network."""
    closed = all(part.linear and part.covariance is not None for part in guides)
    if method is None:
        return closed and not drawn
    if method != "exact" or not closed:
        has = "'exact'" if closed else "draws of the weights"
        raise ConfigError(f"method={method!r}: this posterior has {has} only; leave it out")
    if drawn:
        raise ConfigError(
            f"method={method!r}: samples=0 and keep_samples take the network itself; leave one out"
        )
    return True


def _passes(model: Model, guides: Sequence[Guide], closed: bool, count: int, width: float) -> float:
    """Of the network for a text of `width` outputs, forward and backward."""
    if not model.network.kinds:
        return 1.0
    derivatives = 1 + width - model.likelihood.softmax
    if not count:
        return float(len(guides))
    if closed:
        return len(guides) * (2.0 if model.likelihood.linear_mean else derivatives)
    total = 0.0
    for part, share in strata(guides, count):
        at_once = -(-share // TOGETHER) if part.point else share
        total += derivatives * linear_parts(model, share) if part.linear else at_once
    return total


def _read(
    model: Model, guide: Guide, noise: Tensor, statistics: Statistics, batch: Batch
) -> Sequence[Tensor]:
    """The prediction of one component for a batch: tensors (S, B, ...)."""
    assert guide.covariance is not None
    likelihood = model.likelihood
    outputs, rows = jacobian(model, guide.means(), batch, first=likelihood.linear_mean)
    covariance = guide.covariance.projected(rows)
    if likelihood.linear_mean:
        center = outputs.labels(outputs.mean)
        variance = likelihood.unit**2 * covariance[:, 0, 0]
        return center.mean[None], center.stddev[None], variance[None]
    return statistics(outputs.labels(outputs.draws(covariance, noise)), batch.labels)


def known_of(examples: Examples) -> dict[str, Any]:
    """What a forecast has of its examples: labels and texts, names of classes, choices."""
    known: dict[str, Any] = {"labels": examples.labels, "texts": examples.texts}
    if examples.kind != "rating":
        known["label_names"] = examples.label_names
    return known if examples.kind in ("rating", "labels") else known | {"choices": examples.choices}


def probabilities_of(distribution: TorchDistribution, labels: Tensor | None) -> Sequence[Tensor]:
    """Those of the classes, choices or labels, as the one tensor of these `Statistics`."""
    base: Any = base_of(distribution)
    if isinstance(base, Bernoulli):  # in double precision 1 - p keeps its digits too
        return (base.logits.double().sigmoid(),)
    return (base.probs.float(),)


def _statistics(model: Model, samples: int, seed: int) -> Statistics:
    """A function to the quantities that a forecast needs of the labels' distribution under each of
    `samples` draws."""
    if model.likelihood.kind != "rating":
        return probabilities_of
    seeds = torch.Generator().manual_seed(seed)
    by_draw = -(-_OUTCOMES // max(samples, 1))

    def moments(distribution: TorchDistribution, labels: Tensor | None) -> Sequence[Tensor]:
        base = base_of(distribution)
        try:
            mean, sd = distribution.mean.float(), distribution.stddev.float()
        except NotImplementedError:
            mean = sd = torch.tensor(torch.nan)
        if isinstance(base, Normal):  # the moments are enough
            return mean, sd
        with seeded(int(torch.randint(2**62, (), generator=seeds))):
            outcomes = distribution.sample(torch.Size((by_draw,))).movedim(0, -1).float()
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


def simulate(model: Model, draws: Iterable[Draws], batches: CachedBatches) -> list[Tensor]:
    """Labels drawn from the likelihood for N examples, a set under each of S draws of the weights.

    They are (S, N) of the examples' own type, (S, N, K) if a text has several; if the examples have
    labels, the (S, N) log density of these comes too.
    """
    dtype = torch.int64 if model.likelihood.picks_one else torch.float32

    def labels_of(predicted: TorchDistribution, labels: Tensor | None) -> Sequence[Tensor]:
        sample = predicted.sample().to(dtype)
        return (sample,) if labels is None else (sample, predicted.log_prob(labels))

    parts = zip(*passes(model, draws, batches, labels_of), strict=True)
    return [torch.cat(part) for part in parts]
