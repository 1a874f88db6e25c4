"""The network linearised in its weights, f(w) = f(at) + J(at) (w - at), by reverse mode alone.

A Normal over very many weights moves a transformer's outputs far beyond first order, along
directions about which data say nothing; not those of the linearised network (Khan et al. 2019;
Immer, Korzepa and Bauer 2021). Under a Normal posterior N(at, S) these are exactly Normal, with
mean f(at) and covariance J S J', and no weight is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.nn import functional
from torch.quasirandom import SobolEngine

from ..base.isolation import without_autocast
from ..data.batch import Batch
from ..priors.from_posterior import places
from .likelihoods import Outputs
from .model import Model

__all__ = [
    "AT_ONCE",
    "MAX_BYTES",
    "LinearOutputs",
    "examples_at_once",
    "jacobian",
    "linear_predictives",
    "normal_points",
]

MAX_BYTES = 2**29
"""How many bytes of weight draws share one pass of the network."""
AT_ONCE = 2**31
"""Bytes of Jacobians that are in memory together."""
_MANY = 8  # times as many points as dims: their own covariance is near the identity
_TINY = 2.0**-32  # Sobol points have 30 bits, so 0 may be among them


def examples_at_once(latents: int, outputs: int = 3, most: int = 16) -> int:
    """How many examples have their Jacobians in memory together: as many as 2 GiB hold.

    Each takes a copy of the weights, of their gradients and of three of its Jacobian.
    """
    return max(1, min(most, AT_ONCE // max(4 * latents * (5 + 3 * outputs), 1)))


@dataclass(frozen=True, eq=False)
class LinearOutputs:
    """One vector for each example: the network's outputs, then the likelihood's own weights.

    Attributes:
        model: the model.
        mean: (B, E) at the weights that the network is linearised around.
        shape: of the network's outputs for one example: (outputs,), or (C, outputs) for C choices.
        choices, extra: as the batch's.
    """

    model: Model
    mean: Tensor
    shape: tuple[int, ...]
    choices: Tensor | None
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def labels(self, values: Tensor) -> TorchDistribution:
        """The distribution of the labels, of batch shape `(*S, B)`, at values `(*S, B, E)`."""
        sites, lead = self.model.likelihood.sites, values.shape[:-1]
        sizes = [math.prod(self.shape), *(site.numel for site in sites)]
        network, *parts = values.split(sizes, -1)
        weights = {
            site.name: part.reshape(*lead, *site.shape)
            for site, part in zip(sites, parts, strict=True)
        }
        outputs = network.reshape(*lead, *self.shape)
        labels = self.model.likelihood.distribution
        return labels(Outputs(outputs, weights, self.choices, self.extra))

    @property
    def of_likelihood(self) -> Tensor:
        """(E,) which of them are weights of the likelihood."""
        return torch.arange(self.mean.shape[1]).to(self.mean.device) >= math.prod(self.shape)

    @property
    def of_noise(self) -> Tensor:
        """(E,) which of them is the logarithm of the noise scale."""
        likelihood, parts = self.model.likelihood, [torch.full((math.prod(self.shape),), False)]
        for site in likelihood.sites:
            parts.append(torch.full((site.numel,), site.name == likelihood.noise_site))
        return torch.cat(parts).to(self.mean.device)

    def draws(self, covariance: Tensor, noise: Tensor) -> Tensor:
        """(S, B, E) values of Normals with this mean and a covariance (B, E, E).

        The standard Normal noise (S, E') is the same for every example; first comes that of the
        likelihood's own weights. E' is at least E, whatever the number of choices is.
        """
        network = math.prod(self.shape)
        more = self.mean.shape[1] - network  # the likelihood's
        noise = torch.cat([noise[:, more : more + network], noise[:, :more]], 1)
        if self.choices is not None:  # choices that do not exist do not covary with others
            there = functional.pad(self.choices.float(), (0, more), value=1.0)
            covariance = covariance * there.unsqueeze(-1) * there.unsqueeze(-2)
        # The symmetric root is unique, so no rounding error makes another forecast.
        variance, axes = torch.linalg.eigh(covariance.double())
        root = (axes * variance.clamp_min(0).sqrt().unsqueeze(-2)) @ axes.mT
        return self.mean + torch.einsum("bef,sf->sbe", root.to(noise), noise)


def normal_points(draws: int, size: int, seed: int) -> Tensor:
    """(draws, size) scrambled Sobol points of a standard Normal, in float32 under any default.

    They fill the space evenly, so their averages are several times closer to the expectation than
    those of as many random draws (Owen 1998). They are pairs of opposite signs, so that odd terms
    average out. Where they are many for their size, their covariance is the identity, so that
    variances have no error: the outermost points alone could make it a hundredth.
    """
    engine = SobolEngine(size, scramble=True, seed=seed)
    uniform = engine.draw(-(-draws // 2), dtype=torch.float64)
    half = torch.special.ndtri(uniform.clamp(_TINY, 1 - _TINY))
    if len(half) >= _MANY * size:
        root = torch.linalg.cholesky(half.mT @ half / len(half))
        half = torch.linalg.solve_triangular(root, half.mT, upper=False).mT
    half = half.float()
    return torch.cat([half, -half])[:draws]


def jacobian(
    model: Model, at: Mapping[str, Tensor], batch: Batch, first: bool = False
) -> tuple[LinearOutputs, Tensor]:
    """The outputs of B examples and J, (B, E, D), their derivative with respect to all weights, in
    the order of `at`, which has a tensor of its shape for each site; if `first`, that of the first
    output alone, (B, 1, D).

    It takes one forward pass, and one backward pass for each of the network's outputs. Under a
    softmax only differences between outputs matter. There the derivative is that of the centred
    outputs (less their mean), which takes one backward pass fewer.
    """
    sites, count = model.network.sites, len(batch)
    # Every example is run under weights of its own, so one backward pass gives all their rows.
    leaves = [at[s.name].expand(count, 1, *s.shape).clone().requires_grad_() for s in sites]
    named = {site.name: leaf for site, leaf in zip(sites, leaves, strict=True)}
    with torch.enable_grad():
        outputs, _ = model.network.read(named, replace(batch.split(count), labels=None))
        flat = outputs.reshape(count, -1)
        sums = flat.sum(0).unbind()[: 1 if first else None]
        if model.likelihood.softmax:
            sums = tuple(other - sums[0] for other in sums[1:])
    rows = []
    for total in sums:
        gradients = [gradient.reshape(count, -1) for gradient in slopes(total, leaves)]
        rows.append(torch.cat(gradients, 1).float())
    if model.likelihood.softmax:
        rows.insert(0, torch.zeros_like(rows[0]))
        network = _centred(torch.stack(rows, 1), batch.choices)
    else:
        network = torch.stack(rows, 1)
    linear = _with_likelihood(model, at, outputs[:, 0].detach(), batch)
    if size := linear.mean.shape[1] - flat.shape[1]:
        own = functional.pad(torch.eye(0 if first else size, size), (network.shape[2], 0))
        network = functional.pad(network, (0, size))
        network = torch.cat([network, own.to(network).expand(count, -1, -1)], 1)
    shapes = {site.name: site.shape for site in model.sites}
    if [*at] != [*shapes]:  # a prior may sample the sites in any order
        network = network[..., places(shapes, at).to(network.device)]
    return linear, network


def _with_likelihood(
    model: Model, at: Mapping[str, Tensor], outputs: Tensor, batch: Batch
) -> LinearOutputs:
    """Outputs of the network, (B, ...), with the likelihood's own weights behind them."""
    parts = [at[site.name].flatten() for site in model.likelihood.sites]
    network = outputs.flatten(1).float()
    of_likelihood = torch.cat(parts) if parts else network.new_zeros(0)
    mean = torch.cat([network, of_likelihood.expand(len(network), -1)], 1)
    shape = tuple(outputs.shape[1:])
    return LinearOutputs(model, mean, shape, batch.choices, batch.extra)


def slopes(total: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients with respect to each leaf, zero if it has no effect; the graph is kept."""
    return torch.autograd.grad(
        total, leaves, retain_graph=True, allow_unused=True, materialize_grads=True
    )


def _centred(rows: Tensor, choices: Tensor | None) -> Tensor:
    """(B, C, D) less the mean over the choices that exist, in place; others become 0."""
    there = rows.new_ones(rows.shape[:2]) if choices is None else choices.to(rows)
    mean = torch.einsum("bcd,bc->bd", rows, there / there.sum(1, keepdim=True))
    return rows.sub_(mean.unsqueeze(1)).mul_(there.unsqueeze(2))


def linear_predictives(
    model: Model, at: Mapping[str, Tensor], blocks: Iterable[Mapping[str, Tensor]]
) -> Iterator[tuple[int, Callable[[Batch], TorchDistribution]]]:
    """The labels' distribution in the linearised network, under up to `MAX_BYTES` of draws at once.

    For uses that need weight draws; predictions take `Covariance.projected`. A batch costs one
    `jacobian`, whatever the number of draws. The draws come some at a time, for each site a tensor
    `(s, 1, *shape)`.

    Yields:
        A number S of draws, and a function from a batch of B examples to a distribution of batch
        shape (S, B), which is valid until the next one is asked for.
    """
    away: list[Tensor] = []
    count = 0
    for block in blocks:
        ways = [(block[k][:, 0] - value).reshape(len(block[k]), -1) for k, value in at.items()]
        away.append(torch.cat(ways, 1))
        count += len(away[-1])
        if count * away[-1][0].nbytes >= MAX_BYTES:
            yield count, partial(_predictive, model, at, away)
            away.clear()
            count = 0
    if count:
        yield count, partial(_predictive, model, at, away)


def linear_parts(model: Model, draws: int) -> int:
    """How many times `linear_predictives` takes a `jacobian` of a batch for so many draws."""
    return -(-draws * 4 * sum(site.numel for site in model.sites) // MAX_BYTES)


def _predictive(
    model: Model, at: Mapping[str, Tensor], away: Sequence[Tensor], batch: Batch
) -> TorchDistribution:
    outputs, rows = jacobian(model, at, batch)
    # Block by block, as all of them side by side would be another copy.
    with without_autocast():
        changes = torch.cat([torch.einsum("sd,bed->sbe", part, rows) for part in away])
    return outputs.labels(outputs.mean + changes)
