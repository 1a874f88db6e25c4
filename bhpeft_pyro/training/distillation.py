"""Distillation: one network is trained to predict what many predict together.

The targets are the mixture's probabilities, or the mean and variance of ratings, of texts without
labels (Hinton, Vinyals and Dean 2015; Bucila, Caruana and Niculescu-Mizil 2006).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Bernoulli, Categorical
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.special import entr

from ..base.distributions import base_of
from ..base.progress import work
from ..base.threads import give_way, seeded
from ..data import Examples
from ..data.batch import Batch
from ..errors import FitError
from ..model.cached_batches import BATCH, CachedBatches
from ..model.model import Model
from ..prediction.draws import by_batch
from ..prediction.predict import AnyForecast
from .early_stopping import copied

_WARM_UP = 10  # steps, in which the learning rate rises
_DIVERGED = "distill: the network's outputs are not finite any more; expected a smaller lr"


class Distilled(NamedTuple):
    """What a distillation gives.

    Attributes:
        weights: the student's, by site.
        divergences: the mean divergence on held-out texts before training, and after each epoch.
        best_epoch: the one whose weights are kept; 0 is the start.
    """

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
        size = BATCH * others.per_text
        (values,) = by_batch(model, others, lambda batch: [losses(batch, wanted)[None]], size=size)
        return values.double().mean().item()

    divergences, best, best_epoch = [evaluated()], copied(weights), 0
    with seeded(seed), work("distilling", steps) as bar:
        for epoch in range(1, epochs + 1):
            for batch in texts.training(batch_size, 1, generator):
                give_way()
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
