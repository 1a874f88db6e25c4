"""From many components to one network: a student of a posterior, and how far it is from it.

The targets are the mixture's probabilities, or the mean and variance of ratings, of texts without
labels (Hinton, Vinyals and Dean 2015; Bucila, Caruana and Niculescu-Mizil 2006).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from pyro.distributions import TorchDistribution
from scipy.stats import spearmanr
from torch import Tensor
from torch.distributions import Bernoulli, Categorical
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.special import entr

from ..base.checks import warn
from ..base.distributions import base_of
from ..base.fit_options import FitOptions
from ..base.isolation import seeded
from ..base.progress import bars, work
from ..base.values import Count, Positive, Seed, checked_call
from ..data import Columns, Examples, LabelWarning
from ..data.batch import Batch
from ..data.table import table
from ..errors import DataError, FitError
from ..model.cached_batches import BATCH, CachedBatches
from ..model.model import Model
from ..prediction.draws import by_batch
from ..prediction.predict import AnyForecast
from ..prediction.student import Student, StudentReport, learnt_uncertainty, predict_in_one_pass
from ..training.early_stopping import copied
from .predictor import Predictor

_WARM_UP = 10  # steps, in which the learning rate rises
_DIVERGED = "distill: the network's outputs are not finite any more; expected a smaller lr"

P = TypeVar("P", bound=Predictor)


@checked_call
def distill(
    posterior: P,
    texts: object,
    epochs: Count,
    batch_size: Count,
    lr: Positive,
    seed: Seed,
    progress: bool,
) -> P:
    """See `Posterior.distill`."""
    started, model = time.monotonic(), posterior.model
    nlls = [part.report.component_nll or math.inf for part in posterior.components]
    start = posterior.weights(nlls.index(min(nlls)))  # of the best component, or of the first
    with bars(progress), work("student", 2, at_once=True) as whole:
        examples = read_texts(posterior, texts)
        learnt, held_out = _parted(examples, seed, "texts")
        whole.name("predictions of the posterior")
        posterior = posterior.replace(student=None, promised=None)
        alone = posterior.replace(novelty=None)
        forecasts = [alone.predict(part) for part in (learnt, held_out)]
        targets = [targets_of(forecast, examples.kind) for forecast in forecasts]
        whole.next()
        made = distil(
            model,
            start,
            (learnt, targets[0]),
            (held_out, targets[1]),
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            seed=seed,
        )
        uncertainty = learnt_uncertainty(model, made.weights, learnt, forecasts[0])
        forecast = predict_in_one_pass(model, made.weights, uncertainty, held_out)
        report = StudentReport(
            round=posterior.report.id,
            texts=len(learnt),
            held_out=len(held_out),
            passes=forecasts[1].passes or 0.0,
            rating=examples.kind == "rating",
            best_epoch=made.best_epoch,
            epochs=epochs,
            divergence=made.divergences[made.best_epoch],
            start_divergence=made.divergences[0],
            seconds=time.monotonic() - started,
            **_distances(forecasts[1], forecast, examples.kind),
        )
        whole.next()
    student = Student(made.weights, uncertainty, report, examples.hashes)
    return posterior.replace(student=student)


def read_texts(posterior: Predictor, texts: object) -> Examples:
    """Texts for a student, with labels that tell how good it is; without them, and with a warning,
    if they cannot be read."""
    if not isinstance(texts, Examples):
        texts = table(texts, posterior.columns.inputs(posterior.model.likelihood.kind))
    try:
        return posterior.encode(texts, labelled=False)
    except DataError as error:
        examples = posterior.model.encode_texts(texts, posterior.columns)
        warn(LabelWarning(f"labels are not read: {error}"))
        return examples


def texts_for(model: Model, texts: object, columns: Columns, seed: int) -> Examples:
    """The texts that a student is to learn after a fit, checked before it. Labels are not looked
    at: they may be classes that are still to come.

    Raises:
        DataError: there are fewer than 50 different texts, or they cannot be used.
    """
    examples = model.encode_texts(texts, replace(columns, label_names=None))
    _parted(examples, seed, "distill")
    return examples


def with_student(posterior: P, texts: Examples, options: FitOptions) -> P:
    """A posterior that has just been fitted, with a student.

    Raises:
        FitError: there is no student. `posterior`, of the error, is the one that was fitted.
    """
    try:
        return posterior.distill(texts, seed=options.seed, progress=options.progress)
    except Exception as error:  # too little memory, say
        failed = FitError(f"distill: {error}")
        failed.posterior = posterior
        raise failed from error


def _parted(texts: Examples, seed: int, argument: str) -> tuple[Examples, Examples]:
    """Texts to learn, and others on which the student is compared."""
    learnt, held_out = texts.hold_out(seed)
    if held_out is None:
        count = len(texts) - texts.copies
        raise DataError(
            f"{argument}: got {count} different text{'s' * (count != 1)}; expected at least 50, of "
            "which a fifth are held out"
        )
    return learnt, held_out


def _distances(wanted: Any, given: Any, kind: str) -> dict[str, Any]:
    """How far a student's forecast is from the posterior's, by fields of the report."""
    decided = wanted.mean if kind == "rating" else wanted.label
    difference = given.loss(decided).mean().item()
    both = wanted.epistemic, given.epistemic
    known = all(len(values.unique()) > 1 for values in both)  # not of a single point estimate
    distances = {
        "difference": difference**0.5 if kind == "rating" else difference,
        "rank_correlation": float(spearmanr(*both).statistic) if known else None,
    }
    if wanted.labels is not None:
        distances["nll"] = given.nlls().mean().item()
        distances["posterior_nll"] = wanted.nlls().mean().item()
    return distances


class Distilled(NamedTuple):
    """The student's weights by site, those of the `best_epoch`, and the mean divergences of the
    held-out texts before training (epoch 0) and after each epoch."""

    weights: dict[str, Tensor]
    divergences: list[float]
    best_epoch: int


def targets_of(forecast: AnyForecast, kind: str) -> Tensor:
    """What is to be learnt of a forecast: (N, C) or (N, K) probabilities, or (N, 2) means and
    variances of ratings."""
    if kind == "rating":
        return torch.stack([forecast.free_mean, forecast.total], 1)  # type: ignore[union-attr]
    return forecast.probabilities  # type: ignore[union-attr]


def divergence(predicted: TorchDistribution, targets: Tensor) -> Tensor:
    """(B,) KL(targets || predicted) in nats: of classes, of labels (summed), or of Normals with the
    targets' variance."""
    base = base_of(predicted)
    if isinstance(base, Bernoulli):
        losses = binary_cross_entropy_with_logits(base.logits, targets, reduction="none")
        return (losses - entr(targets) - entr(1 - targets)).sum(-1)
    if isinstance(base, Categorical):
        shown = targets[:, : base.logits.shape[-1]]  # a batch may have fewer choices than all
        return -(shown * base.logits.where(shown > 0, 0.0) + entr(shown)).sum(-1)
    mean, variance = targets.unbind(1)
    return (predicted.mean - mean).square() / (2 * variance)


def distil(
    model: Model,
    start: Mapping[str, Tensor],
    learnt: tuple[Examples, Tensor],
    held_out: tuple[Examples, Tensor],
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
) -> Distilled:
    """Train weights of all sites of a network by Adam; the likelihood's own weights stay.

    Args:
        model: the network, and the likelihood that makes a distribution of its outputs.
        start: initial values, in each site's shape.
        learnt: texts and their targets.
        held_out: others, which choose the epoch whose weights are kept.
        epochs, batch_size, lr, seed: as for a fit.

    Raises:
        FitError: the divergence was not finite.
    """
    trained = [site.name for site in model.network.sites]
    weights = {name: start[name].detach().clone() for name in (site.name for site in model.sites)}
    leaves = [weights[name].requires_grad_() for name in trained]
    # The row of each text takes the place of its label.
    texts, others = (
        CachedBatches(model, replace(part, labels=torch.arange(len(part))))
        for part, _ in (learnt, held_out)
    )
    device, generator = model.network.device, torch.Generator().manual_seed(seed)
    targets, wanted = learnt[1].to(device), held_out[1].to(device)
    optimizer = torch.optim.Adam(leaves, lr=lr)
    steps = epochs * -(-len(learnt[0]) // batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda done: (
            min(1.0, (done + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * min(1, done / steps)))
        ),
    )

    def losses(batch: Batch, of: Tensor) -> Tensor:
        assert batch.labels is not None
        try:
            predicted = model.predictive(weights, batch)
        except ValueError as error:  # distributions take no NaN
            raise FitError(f"{_DIVERGED} ({error!s:.300})") from error
        return divergence(predicted, of[batch.labels.flatten()])

    def evaluated() -> float:
        (values,) = by_batch(model, others, lambda batch: [losses(batch, wanted)[None]], size=BATCH)
        return values.double().mean().item()

    divergences, best, best_epoch = [evaluated()], copied(weights), 0
    with seeded(seed), work("distilling", steps) as bar:
        for epoch in range(1, epochs + 1):
            for batch in texts.training(batch_size, 1, generator):
                optimizer.zero_grad()
                value = losses(batch.to(device), targets).mean()
                if not value.isfinite():
                    raise FitError(_DIVERGED)
                value.backward()
                optimizer.step()
                schedule.step()
                bar.next(f"divergence {divergences[-1]:.4f}")
            divergences.append(evaluated())
            if divergences[-1] <= min(divergences):
                best, best_epoch = copied(weights), epoch
    return Distilled(best, divergences, best_epoch)
