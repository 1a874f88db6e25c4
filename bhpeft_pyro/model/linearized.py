"""The network linearised in its weights, f(w) = f(at) + J(at) (w - at), by reverse mode alone.

A Normal over very many weights moves a transformer's outputs by more than its first order, along
directions about which data say nothing; the linearised network it does not (Khan et al. 2019;
Immer, Korzepa and Bauer 2021). Its outputs are linear in the weights: under a Normal posterior
N(at, S) they are Normal with mean f(at) and covariance J S J', exactly, without a draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.nn import functional

from ..data.batch import Batch
from ..distributions import Covariance, exact
from .model import Model

__all__ = [
    "MAX_BYTES",
    "Outputs",
    "jacobian",
    "linear_predictives",
    "output_moments",
    "symmetric_noise",
]


MAX_BYTES = 2**29
"""Weight draws are predicted with together, a pass of the network for all, up to so many bytes."""


class Outputs:
    """What the likelihood reads, as one vector an example: the network's outputs, then the
    likelihood's own weights (a noise scale, cutpoints).

    Attributes:
        model: the model.
        mean: (B, E) at the weights that the network is linearised around.
        shape: of the network's outputs for one example: (outputs,), or (C, outputs) for C choices.
        choices: as the batch's.
    """

    def __init__(
        self, model: Model, mean: Tensor, shape: tuple[int, ...], choices: Tensor | None
    ) -> None:
        self.model, self.mean, self.shape, self.choices = model, mean, shape, choices

    def labels(self, values: Tensor) -> TorchDistribution:
        """The distribution of the labels, of batch shape `(*S, B)`, at values `(*S, B, E)`."""
        ends = [math.prod(self.shape)]
        ends += [site.numel for site in self.model.likelihood.sites]
        network, *own = values.split(ends, -1)
        lead = values.shape[:-1]
        weights = {
            site.name: part.reshape(*lead, *site.shape)
            for site, part in zip(self.model.likelihood.sites, own, strict=True)
        }
        outputs = network.reshape(*lead, *self.shape)
        return self.model.likelihood.distribution(outputs, weights, self.choices)

    def draws(self, covariance: Tensor, noise: Tensor) -> Tensor:
        """(S, B, E) values of Normals with this mean.

        Args:
            covariance: (B, E, E).
            noise: (S, E') standard Normal, first for the likelihood's own weights; the same for
                every example, and with E' above E for every number of choices.
        """
        network = math.prod(self.shape)
        own = self.mean.shape[1] - network
        noise = torch.cat([noise[:, own : own + network], noise[:, :own]], 1)
        if self.choices is not None:  # one that is not there has nothing to do with the others
            there = functional.pad(self.choices.float(), (0, own), value=1.0)
            covariance = covariance * there.unsqueeze(-1) * there.unsqueeze(-2)
        # The symmetric root is unique, so no rounding error makes another forecast.
        variance, axes = torch.linalg.eigh(covariance.double())
        root = (axes * variance.clamp_min(0).sqrt().unsqueeze(-2)) @ axes.mT
        return self.mean + torch.einsum("bef,sf->sbe", root.to(noise), noise)

    def mean_variance(self, covariance: Tensor) -> Tensor:
        """(B,) variance of the labels' mean, for likelihoods of constant noise."""
        return self.model.likelihood.unit**2 * covariance[:, 0, 0]


def symmetric_noise(draws: int, size: int) -> Tensor:
    """(draws, size) standard Normal in pairs of opposite signs: what is odd in it averages out."""
    half = torch.randn(-(-draws // 2), size)
    return torch.cat([half, -half])[:draws]


def jacobian(model: Model, at: Mapping[str, Tensor], batch: Batch) -> tuple[Outputs, Tensor]:
    """The outputs at `at` and their derivative by all weights, example by example.

    One pass forwards and one backwards for each of the network's outputs: every example is run
    under weights of its own.

    Args:
        model: the model.
        at: a tensor of its shape for each site of the model.
        batch: B examples, not shared out; no label is looked at.

    Returns:
        The outputs, and J, (B, E, D), over the weights in the order of the model's sites.
    """
    sites, count = model.network.sites, len(batch)
    leaves = [at[s.name].expand(count, 1, *s.shape).clone().requires_grad_() for s in sites]
    named = {site.name: leaf for site, leaf in zip(sites, leaves, strict=True)}
    with torch.enable_grad():
        outputs = model.outputs(named, replace(batch.split(count), labels=None))
        shape = tuple(outputs.shape[2:])
        flat = outputs.reshape(count, -1)
        sums = flat.sum(0).unbind()
    rows = []
    for total in sums:
        gradients = torch.autograd.grad(
            total, leaves, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        rows.append(torch.cat([gradient.reshape(count, -1) for gradient in gradients], 1).float())
    network = torch.stack(rows, 1)
    own = [at[site.name].flatten() for site in model.likelihood.sites]
    extra = torch.cat(own) if own else network.new_zeros(0)
    mean = torch.cat([flat.detach().float(), extra.expand(count, -1)], 1)
    if len(extra):
        found = network.new_zeros(count, mean.shape[1], network.shape[2] + len(extra))
        found[:, : network.shape[1], : network.shape[2]] = network
        found[:, network.shape[1] :, network.shape[2] :] = torch.eye(len(extra)).to(network)
        network = found
    return Outputs(model, mean, shape, batch.choices), network


def output_moments(
    model: Model, at: Mapping[str, Tensor], covariance: Covariance, batch: Batch
) -> tuple[Outputs, Tensor]:
    """The outputs of a batch under N(at, covariance): their mean, f(at), and covariance, J S J'.

    Args:
        model, at, batch: as for `jacobian`.
        covariance: S, over the weights in the order of the model's sites.

    Returns:
        The outputs at their mean, and their covariance (B, E, E).
    """
    outputs, rows = jacobian(model, at, batch)
    with exact(rows):
        scaled = rows * covariance.scale
        along = scaled @ covariance.axes
        found = scaled @ scaled.mT + (along * (covariance.ratio.square() - 1)) @ along.mT
    return outputs, found


def linear_predictives(
    model: Model, at: Mapping[str, Tensor], blocks: Iterable[Mapping[str, Tensor]]
) -> Iterator[tuple[int, Callable[[Batch], TorchDistribution]]]:
    """The labels' distribution in the linearised network, under up to `MAX_BYTES` of draws at once.

    For what needs weight draws; predictions take `output_moments`. A batch costs one `jacobian`,
    however many draws are together.

    Args:
        at: a tensor of its shape for each site of the model.
        blocks: some draws at a time, for each site of the model a tensor `(s, 1, *shape)`.

    Yields:
        A number S of draws, and from a batch of B examples to a distribution of batch shape (S, B).
        Use it before the next is asked for: then its draws are gone.
    """
    away: list[Tensor] = []
    count = 0
    for block in blocks:
        ways = [
            (block[s.name][:, 0] - at[s.name]).reshape(len(block[s.name]), -1) for s in model.sites
        ]
        away.append(torch.cat(ways, 1))
        count += len(away[-1])
        if count * away[-1][0].nbytes >= MAX_BYTES:
            yield count, partial(_predictive, model, at, away)
            away.clear()
            count = 0
    if count:
        yield count, partial(_predictive, model, at, away)


def _predictive(
    model: Model, at: Mapping[str, Tensor], away: Sequence[Tensor], batch: Batch
) -> TorchDistribution:
    outputs, rows = jacobian(model, at, batch)
    # Block by block, as all of them side by side would be another copy; and at full precision.
    with exact(rows):
        changes = torch.cat([torch.einsum("sd,bed->sbe", part, rows) for part in away])
    return outputs.labels(outputs.mean + changes)
