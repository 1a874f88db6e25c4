"""The Fisher information of a model's weights, from gradients example by example."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Normal

from ..batch import Batch
from ..model import Model
from ..priors import complete

__all__ = ["diagonal", "every", "from_prior", "sampled", "scores"]

# Labels of a batch, and what each of them weighs.
Outcome = tuple[Tensor, Tensor]
_DRAWS = 32  # of a prior


def sampled(predictive: TorchDistribution) -> list[Outcome]:
    """One outcome for each example, drawn."""
    y = predictive.sample()
    return [(y, torch.ones_like(y, dtype=torch.get_default_dtype()))]


@torch.no_grad()
def every(predictive: TorchDistribution) -> list[Outcome]:
    """Outcomes whose scores, weighted, have the Fisher information for their second moment.

    All classes; of a Normal the mean and sqrt(3) sds to both sides, with weights of 2/3 and 1/6
    (Gauss and Hermite's rule, exact for polynomials up to the fifth degree; the squared scores of
    mean and sd have the fourth). Of any other distribution one that is drawn.
    """
    if predictive.has_enumerate_support:
        return [(y, predictive.log_prob(y).exp()) for y in predictive.enumerate_support()]
    if isinstance(predictive, Normal):
        mean, away = predictive.mean, 3**0.5 * predictive.stddev
        rule = ((0.0, 2 / 3), (-1.0, 1 / 6), (1.0, 1 / 6))
        return [(mean + step * away, torch.full_like(away, weight)) for step, weight in rule]
    return sampled(predictive)


def scores(
    model: Model,
    weights: Mapping[str, Tensor],
    batch: Batch,
    given: Mapping[str, Tensor] = MappingProxyType({}),
    outcomes: Callable[[TorchDistribution], list[Outcome]] = sampled,
) -> Iterator[dict[str, Tensor]]:
    """Gradients of log p(y | x, w), example by example, each times the root of p(y).

    The sum of their squares over outcomes y is the diagonal of the Fisher information; no label is
    looked at. Every example is run as a particle, under weights of its own.

    Args:
        weights: for each site of the model, or for each latent of its prior, a tensor
            (B, 1, *shape).
        batch: B examples, not shared out.
        given: the other sites or latents, of which no gradients are asked for.
        outcomes: which y: one drawn from the model itself, or `every` one.

    Yields:
        For each outcome the names of `weights` to (B, *shape).
    """
    leaves = {name: value.detach().requires_grad_() for name, value in weights.items()}
    with torch.enable_grad():
        whole = complete(model.prior, model.sites, {**given, **leaves})
        predictive = model.predictive(whole, replace(batch.split(len(batch)), labels=None))
        for y, probability in outcomes(predictive):
            # An outcome that cannot be, such as a choice that does not exist, has no gradient.
            log_prob = predictive.log_prob(y)[probability > 0]
            root = probability[probability > 0].sqrt()
            total = (root * log_prob).sum()
            if not total.requires_grad:  # PEFT weights alone, on frozen features
                yield {name: torch.zeros_like(leaf[:, 0]) for name, leaf in leaves.items()}
                continue
            grads = torch.autograd.grad(
                total,
                list(leaves.values()),
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            yield {name: grad[:, 0] for name, grad in zip(leaves, grads, strict=True)}


def diagonal(
    model: Model, weights: Mapping[str, Tensor], batches: Iterable[Batch]
) -> dict[str, Tensor]:
    """The diagonal of the Fisher information of one example, at one value of the weights.

    Args:
        weights: for each site of the model, or for each latent of its prior, a tensor of its shape.

    Returns:
        The same names to tensors of the same shapes.
    """
    sums = {name: torch.zeros_like(value) for name, value in weights.items()}
    count = 0
    for batch in batches:
        count += len(batch)
        copies = {name: weights[name].expand(len(batch), 1, *sums[name].shape) for name in sums}
        for gradients in scores(model, copies, batch, outcomes=every):
            for name, gradient in gradients.items():
                sums[name] += gradient.square().sum(0)
    return {name: total / count for name, total in sums.items()}


def from_prior(model: Model, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What latents tell about others that their prior depends on (weights about their scale).

    The diagonal of the Fisher information of p(latents), apart from each one's own density: no
    data are looked at.

    Args:
        latents: one value, of its shape, of each latent of the prior.

    Returns:
        The same names to tensors of the same shapes.
    """
    leaves = {name: value.detach().requires_grad_() for name, value in latents.items()}
    sums = {name: torch.zeros_like(value) for name, value in leaves.items()}
    with torch.enable_grad(), poutine.block():
        conditioned = poutine.condition(model.prior, data=leaves)
        nodes: dict[str, Any] = poutine.trace(conditioned).get_trace(model.sites).nodes
        for _ in range(_DRAWS):
            densities = (nodes[name]["fn"] for name in leaves)
            log_prob = sum((fn.log_prob(fn.sample()).sum() for fn in densities), torch.zeros(()))
            if not log_prob.requires_grad:  # no latent's prior depends on another
                break
            grads = torch.autograd.grad(
                log_prob,
                list(leaves.values()),
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            for name, grad in zip(leaves, grads, strict=True):
                sums[name] += grad.square()
    return {name: total / _DRAWS for name, total in sums.items()}
