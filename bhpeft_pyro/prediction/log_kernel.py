"""Positive numbers of a text, such as a variance, as a learnt function of its forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ..base.isolation import without_autocast
from ..data.batch import random_order

OF_CHOICES = 2  # numbers for the outputs of choices: their largest probabilities
_POINTS = 2000  # of a kernel, at most
_LEAST = 1e-20  # of a variance
_CONSTANT = 1e-5  # an sd over the largest number beside it, below which it is rounding error
_LENGTHS = (0.5, 1.0, 2.0, 8.0)  # of the median squared distance
_PENALTIES = torch.logspace(-4, 2, 19, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class LogKernel:
    """Positive numbers of a text: exp(f), K functions f by kernel ridge regression.

    Far from all texts that were learnt, f is its mean over these.

    Attributes:
        points: (N, F) of the texts that were learnt, standardised.
        coefficients: (N, K).
        mean: (K,).
        center, scale: (F,) that standardise.
        length: () of the kernel exp(-|x - y|^2 / length).

    >>> features = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    >>> values = (1 + features[:, :1]).exp()
    >>> learnt = LogKernel.fitted(features, values, 2)
    >>> bool((learnt(features) / values).log().std() < 0.05)
    True
    """

    points: Tensor
    coefficients: Tensor
    mean: Tensor
    center: Tensor
    scale: Tensor
    length: Tensor

    def __post_init__(self) -> None:
        points, (width,), (numbers,) = len(self.points), self.center.shape, self.mean.shape
        for name, shape in {
            "points": (points, width),
            "coefficients": (points, numbers),
            "mean": (numbers,),
            "center": (width,),
            "scale": (width,),
            "length": (),
        }.items():
            value = getattr(self, name)
            if (got := (tuple(value.shape), value.dtype)) != (shape, torch.float32):
                raise ValueError(f"{name} is {got}, expected {(shape, torch.float32)}")

    @without_autocast()  # in bfloat16 the sum would be right to a digit or two
    def __call__(self, features: Tensor) -> Tensor:
        """(B, F) features to (B, K) numbers."""
        near = _kernel((features.float() - self.center) / self.scale, self.points, self.length)
        return (self.mean + near @ self.coefficients).exp()

    @classmethod
    def fitted(cls, features: Tensor, values: Tensor, width: int) -> Self:
        """Learn (N, K) positive values of (N, F) features, the first `width` of which count in
        distances as much as all others together.

        Length and penalty have the lowest leave-one-out error, which is in closed form. Then the
        numbers are multiplied by a constant, so that left-out values are on average what is said of
        them: the exponential of a mean logarithm is too small (Duan 1983).
        """
        order = random_order(len(features))[:_POINTS]
        x, y = features[order].double(), values[order].double().clamp_min(_LEAST).log()
        center, scale = x.mean(0), torch.cat([_scale(x[:, :width]), _scale(x[:, width:])])
        points, mean = (x - center) / scale, y.mean(0)
        median = torch.cdist(points, points).square().median().clamp_min(_LEAST)
        tried = []
        for length in (times * median for times in _LENGTHS):
            coefficients, left_out = _ridge(_kernel(points, points, length), y - mean)
            tried.append((left_out.square().mean().item(), coefficients, left_out, length))
        _, coefficients, left_out, length = min(tried, key=lambda one: one[0])
        shift = left_out.exp().mean(0).log()
        made = points, coefficients, mean + shift, center, scale, length
        return cls(*(value.float() for value in made))


def _scale(x: Tensor) -> Tensor:
    """(F,) that standardise (N, F) of one size, and make distances independent of F.

    A feature that is the same for all texts says nothing, so a small change of it says no more.
    There always is one: standardised over its entries, a pooled state has a sum of 0.
    """
    sds = x.std(0, correction=0)
    return sds.where(sds > _CONSTANT * x.abs().amax(), 1.0) * x.shape[1] ** 0.5


def _kernel(x: Tensor, points: Tensor, length: Tensor) -> Tensor:
    return (-torch.cdist(x, points).square() / length).exp()


def _ridge(kernel: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients (N, K) and leave-one-out residuals (N, K), each column with its own penalty."""
    strength, axes = torch.linalg.eigh(kernel)
    along = axes.mT @ values
    columns = []
    for value, part in zip(values.unbind(1), along.unbind(1), strict=True):
        tried = []
        for penalty in _PENALTIES * len(kernel):
            shrunk = strength.clamp_min(0) / (strength.clamp_min(0) + penalty)
            left = (value - axes @ (shrunk * part)) / (1 - axes.square() @ shrunk).clamp_min(1e-6)
            tried.append((left.square().mean().item(), left, penalty))
        _, left, penalty = min(tried, key=lambda one: one[0])
        columns.append((axes @ (part / (strength.clamp_min(0) + penalty)), left))
    coefficients, left_out = zip(*columns, strict=True)
    return torch.stack(coefficients, 1), torch.stack(left_out, 1)


def of_pass(features: Tensor, outputs: Tensor, choices: Tensor | None) -> Tensor:
    """What is learnt from of the pass of B texts: the features that the head reads, then outputs.

    Args:
        features: (B, D), or (B, C, D) for C choices, of which the mean is taken.
        outputs: (B, K), or (B, C, K), of which the largest probabilities are taken.
        choices: (B, C) which of them exist.

    Returns:
        (B, D + K), or (B, D + 2) for choices.
    """
    if choices is None:
        return torch.cat([features.float(), outputs.float()], 1)
    there = choices.to(features).unsqueeze(-1)
    mean = (features * there).sum(1) / there.sum(1)
    scores = outputs[..., 0].float().masked_fill(~choices, -torch.inf)
    return torch.cat([mean.float(), scores.softmax(1).topk(OF_CHOICES).values], 1)
