"""The Fisher information of a model's weights, from per-example gradients.

For the likelihoods of this package it equals the generalised Gauss-Newton matrix, in expectation
over labels of the model. Labels of the data are never used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Independent, Normal

from ..data.batch import Batch
from ..priors import complete
from .linearized import slopes
from .model import Model

_DRAWS = 32  # from a prior


def one_outcome(predictive: TorchDistribution) -> list[Tensor]:
    """log p(y) of one drawn outcome per example."""
    return [predictive.log_prob(predictive.sample())]


def all_outcomes(predictive: TorchDistribution) -> list[Tensor]:
    """Quantities whose gradients' outer products sum to the Fisher information, or none.

    For K classes these are K - 1 contrasts. The K scores g_k = sqrt(p_k) grad log p_k would do, but
    sum_k sqrt(p_k) g_k = 0, so a reflection that takes sqrt(p) to the last axis makes the last one
    zero. For a Normal: the mean in sds, and sqrt(2) times the log sd, whose scores are independent.
    For several labels: those of each label.
    """
    if isinstance(predictive, Independent):
        dims, inner = predictive.reinterpreted_batch_ndims, all_outcomes(predictive.base_dist)
        return [part for several in inner for part in several.flatten(-dims).unbind(-1)]
    if predictive.has_enumerate_support:
        try:
            outcomes = predictive.enumerate_support()
        except NotImplementedError:  # a Binomial whose examples differ in their number of trials
            return []
        logs = predictive.log_prob(outcomes)
        roots = (0.5 * logs.detach()).exp()
        # An impossible outcome, such as a choice that does not exist, has no gradient.
        logs = logs.masked_fill(roots == 0, 0.0)
        share = roots[-1] / (1 + roots[-1])
        return list(roots[:-1] * (logs[:-1] - share * logs[-1]))
    if isinstance(predictive, Normal):
        return [predictive.mean / predictive.stddev.detach(), 2**0.5 * predictive.stddev.log()]
    return []


def scores(
    model: Model,
    weights: Mapping[str, Tensor],
    batch: Batch,
    outcomes: Callable[[TorchDistribution], list[Tensor]] = one_outcome,
) -> Iterator[dict[str, Tensor]]:
    """Per-example gradients of log p(y | x, w), with y from the model.

    The sum of their squares is the diagonal of the Fisher information. Every example is run as a
    particle with its own weights.

    Args:
        model: the model.
        weights: for each site, or for each latent of its prior, a tensor `(B, 1, *shape)`.
        batch: B examples, not split over particles.
        outcomes: which y: `one_outcome` that is sampled, or `all_outcomes`; for each outcome there
            is a mapping from the names of `weights` to tensors `(B, *shape)`.
    """
    leaves = {name: value.detach().requires_grad_() for name, value in weights.items()}
    with torch.enable_grad():
        whole = complete(model.prior, model.sites, leaves)
        predictive = model.predictive(whole, replace(batch.split(len(batch)), labels=None))
        for total in (part.sum() for part in outcomes(predictive)):
            if not total.requires_grad:  # PEFT weights alone, on frozen features
                yield {name: torch.zeros_like(leaf[:, 0]) for name, leaf in leaves.items()}
                continue
            grads = slopes(total, [*leaves.values()])
            yield {name: grad[:, 0] for name, grad in zip(leaves, grads, strict=True)}


def diagonal(
    model: Model, weights: Mapping[str, Tensor], batches: Iterable[Batch]
) -> dict[str, Tensor]:
    """The diagonal of the Fisher information of one example, averaged over examples: in the shapes
    of the weights, which are given by site or by latent of the prior."""

    def outcomes(predictive: TorchDistribution) -> list[Tensor]:
        return all_outcomes(predictive) or one_outcome(predictive)  # the latter in expectation

    sums = {name: torch.zeros_like(value) for name, value in weights.items()}
    count = 0
    for batch in batches:
        count += len(batch)
        copies = {name: weights[name].expand(len(batch), 1, *sums[name].shape) for name in sums}
        for gradients in scores(model, copies, batch, outcomes):
            for name, gradient in gradients.items():
                sums[name] += gradient.square().sum(0)
    return {name: total / count for name, total in sums.items()}


def from_prior(model: Model, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The information of latents about others that their prior depends on.

    Weights, for example, are informative about their scale. The result is the diagonal of the
    Fisher information of p(latents), without the contribution of each latent's own density, at one
    value of each latent of the model's prior, and in its shape.
    """
    leaves = {name: value.detach().requires_grad_() for name, value in latents.items()}
    sums = {name: torch.zeros_like(value) for name, value in leaves.items()}
    with torch.enable_grad(), poutine.block():
        conditioned = poutine.condition(model.prior, data=leaves)
        nodes: dict[str, Any] = poutine.trace(conditioned).get_trace(model.sites).nodes
        for _ in range(_DRAWS):
            densities = (nodes[name]["fn"] for name in leaves)
            log_prob = sum((fn.log_prob(fn.sample()).sum() for fn in densities), torch.zeros(()))
            if not log_prob.requires_grad:  # no latent depends on another
                break
            grads = slopes(log_prob, [*leaves.values()])
            for name, grad in zip(leaves, grads, strict=True):
                sums[name] += grad.square()
    return {name: total / _DRAWS for name, total in sums.items()}
