"""The Fisher information of a model's weights, from gradients example by example."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ..batch import Batch
from ..model import Model
from ..priors import complete

__all__ = ["diagonal", "from_prior", "scores"]

_DRAWS = 32  # of a prior


def scores(
    model: Model,
    weights: Mapping[str, Tensor],
    batch: Batch,
    given: Mapping[str, Tensor] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """Gradients of log p(y | x, w), example by example, with y drawn from the model itself.

    Their mean square is the diagonal of the Fisher information; no label is looked at. Every
    example is run as a particle, under weights of its own.

    Args:
        weights: for each site of the model, or for each latent of its prior, a tensor
            (B, 1, *shape).
        batch: B examples, not shared out.
        given: the other sites or latents, of which no gradients are asked for.

    Returns:
        The names of `weights` to (B, *shape).
    """
    leaves = {name: value.detach().requires_grad_() for name, value in weights.items()}
    with torch.enable_grad():
        whole = complete(model.prior, model.sites, {**given, **leaves})
        predictive = model.predictive(whole, replace(batch.split(len(batch)), labels=None))
        log_prob = predictive.log_prob(predictive.sample()).sum()
    if not log_prob.requires_grad:  # PEFT weights alone, on frozen features
        return {name: torch.zeros_like(leaf[:, 0]) for name, leaf in leaves.items()}
    grads = torch.autograd.grad(
        log_prob, list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    return {name: grad[:, 0] for name, grad in zip(leaves, grads, strict=True)}


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
        for name, gradients in scores(model, copies, batch).items():
            sums[name] += gradients.square().sum(0)
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
