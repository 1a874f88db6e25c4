"""What backward passes, or several networks, say of a text, as a function of its features.

It is learnt from some texts, without labels, and then costs no more than the forward pass that
predicts a text and computes its features anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

_LEAST = 1e-20  # of a variance
_TURNS = 3  # of factors and shape, each given the other
_PENALTIES = torch.logspace(-3, 4, 29, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class LogLinear:
    """exp(bias + weight' features), K numbers for each text.

    Attributes:
        weight: (K, D).
        bias: (K,).

    >>> features = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    >>> values = (1 + features[:, :1]).exp()
    >>> learnt = LogLinear.fitted(features, values)
    >>> torch.allclose(learnt(features), values, rtol=0.01)
    True
    """

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """(B, D) features to (B, K) numbers."""
        return (features.float() @ self.weight.mT + self.bias).exp()

    @classmethod
    def fitted(cls, features: Tensor, values: Tensor) -> LogLinear:
        """Ridge regression of the logarithms of (N, K) positive values on (N, D) features.

        The penalty has the lowest leave-one-out error, which is in closed form; the largest one
        that is tried leaves hardly more than a constant. Then the numbers are multiplied by a
        constant, so that the left-out values are on average what is said of them: the exponential
        of a mean logarithm is too small (Duan 1983).
        """
        x, y = features.double(), values.double().clamp_min(1e-30).log()
        center, sd, mean = x.mean(0), x.std(0, correction=0).clamp_min(1e-6), y.mean(0)
        u, s, vh = torch.linalg.svd((x - center) / sd, full_matrices=False)
        projected = u.mT @ (y - mean)
        weights, biases = [], []
        for k in range(y.shape[1]):
            best, lowest, left = None, torch.inf, None
            for penalty in _PENALTIES * len(x):
                shrunk = s.square() / (s.square() + penalty)
                fit = u @ (shrunk * projected[:, k])
                leverage = 1 / len(x) + u.square() @ shrunk  # the first part is the constant's
                residuals = (y[:, k] - mean[k] - fit) / (1 - leverage).clamp_min(1e-6)
                error = residuals.square().mean().item()
                if error < lowest:
                    best, lowest, left = penalty, error, residuals
            assert best is not None and left is not None
            weight = vh.mT @ (s / (s.square() + best) * projected[:, k]) / sd
            weights.append(weight)
            biases.append(mean[k] - center @ weight + left.exp().mean().log())
        return cls(torch.stack(weights).float(), torch.stack(biases).float())


@dataclass(frozen=True, eq=False)
class OutputCovariance:
    """The covariance of a linearised network's outputs: one shape for all texts, times a factor.

    Attributes:
        factor: of the features that the head reads; of choices, of their mean.
        shape: (E, E) of the outputs and the likelihood's own weights, at a factor of 1; (0, 0) for
            choices, whose scores then vary independently, all by the same variance.
        inside: how many of the E are outputs of the network, which the factor is for.
    """

    factor: LogLinear
    shape: Tensor
    inside: int

    def __call__(self, features: Tensor, choices: Tensor | None) -> Tensor:
        """(B, D) pooled features to (B, E, E) covariances; with (B, C) which choices exist, to
        (B, C, C) of their scores less the mean."""
        factor = self.factor(features).unsqueeze(-1)  # (B, 1, 1)
        if choices is not None:
            return factor * _contrasts(choices)
        one = torch.ones(1, 1, len(self.shape) - self.inside).to(factor)
        sds = torch.cat(
            [factor.sqrt().expand(-1, 1, self.inside), one.expand(len(factor), -1, -1)], 2
        )
        return sds.mT * self.shape * sds

    @classmethod
    def fitted(cls, features: Tensor, factors: Tensor, shape: Tensor, inside: int) -> Self:
        """From the (N, D) pooled features of some texts, and the parts of their covariances."""
        return cls(LogLinear.fitted(features, factors.unsqueeze(1)), shape.float(), inside)


def parts_of(covariances: Tensor, inside: int, choices: Tensor | None) -> tuple[Tensor, Tensor]:
    """Factors (N,) and the `OutputCovariance.shape` that come nearest to (N, E, E) covariances.

    The factor of a text is that with the least KL from its covariance to the shape's, and the shape
    is the mean of the covariances over their factors.
    """
    matrices = covariances.double()
    if choices is not None:
        total = matrices.diagonal(dim1=1, dim2=2).sum(1)
        return total / (choices.sum(1) - 1).clamp_min(1), matrices.new_zeros(0, 0)
    network = matrices[:, :inside, :inside]
    factors = network.diagonal(dim1=1, dim2=2).mean(1).clamp_min(_LEAST)
    for _ in range(_TURNS):
        strength, axes = torch.linalg.eigh((network / factors.reshape(-1, 1, 1)).mean(0))
        kept = strength > _LEAST + 1e-6 * strength[-1]  # under a softmax one has no variance
        axes = axes[:, kept] / strength[kept].sqrt()
        along = torch.einsum("ek,nef,fk->n", axes, network, axes) / max(axes.shape[1], 1)
        factors = along.clamp_min(_LEAST)
    sds = torch.ones(len(matrices), 1, matrices.shape[1]).to(matrices)
    sds[:, :, :inside] = factors.rsqrt().reshape(-1, 1, 1)
    return factors, (sds.mT * matrices * sds).mean(0)


def pooled(features: Tensor, choices: Tensor | None) -> Tensor:
    """(B, D) features: of (B, C, D) those of choices their mean over the choices that exist."""
    if choices is None:
        return features
    there = choices.to(features).unsqueeze(-1)
    return (features * there).sum(1) / there.sum(1)


def _contrasts(choices: Tensor) -> Tensor:
    """(B, C, C) the covariance of independent scores of variance 1 less their mean."""
    there = choices.float()
    both = there.unsqueeze(1) * there.unsqueeze(2)
    return torch.diag_embed(there) - both / there.sum(1).reshape(-1, 1, 1)
