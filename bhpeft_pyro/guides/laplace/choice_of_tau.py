"""The width and output scale of Laplace approximations, one or several, that suit held-out rows.

The predictive density of a mixture is the mean of its components' densities. So the choice needs
only the density of each held-out row, under each component, at each tau and output scale of a grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from ...base.distributions import Covariance
from ...model.linearized import normal_points
from ...model.model import Model
from ...priors import JointPrior
from .curvature import Jacobians

if TYPE_CHECKING:
    from .laplace_guide import LaplaceGuide

TAUS = torch.logspace(-4, 4, 21, dtype=torch.float64)
_SPREAD = 0.5  # prior sd of an output scale's logarithm, so that few rows hardly move it from 1
DRAWS = 256  # of the outputs, to evaluate a width
_COST = 0.003  # of the point estimate's NLL, or of a nat, at most (TFB; Shi et al. 2024)
_ALIKE = 0.001  # of the best NLL, or of a nat: smaller differences are ignored


@dataclass(frozen=True)
class Choice:
    """A chosen width.

    Attributes:
        tau: the multiple of the first prior's precision in the covariance.
        noise: the ratings' noise scale, as a multiple of the trained one.
        output_scale: the factor of the outputs in predictions.
        point_nll: held-out NLL of the point estimate, with the noise that suits it.
        nll: held-out NLL of the component.
    """

    tau: float
    noise: float = 1.0
    output_scale: float = 1.0
    point_nll: float | None = None
    nll: float | None = None


@dataclass(frozen=True)
class Candidates:
    """The densities of N held-out rows under a component, at each of T taus and C output scales.

    Attributes:
        taus: (T,) from wide to narrow.
        noises: (T,) the best noise scale at each tau, as a multiple of the trained one.
        output_scales: (C,), 1 among them.
        log_densities: (T, C, N) of the labels.
        point: (N,) the same under the point estimate, at an output scale of 1.
        ratings: whether the labels are ratings. Their NLL depends on their unit, so a small
            difference is a part of a nat, not of the NLL.
    """

    taus: Tensor
    noises: Tensor
    output_scales: Tensor
    log_densities: Tensor
    point: Tensor
    ratings: bool = False

    def near(self, nll: Tensor, share: float) -> Tensor:
        """The NLL and a share of it, or of a nat."""
        return nll + share * (1.0 if self.ratings else nll.abs())

    @property
    def unscaled(self) -> Tensor:
        """(T, N) log densities at an output scale of 1."""
        return self.log_densities[:, self.output_scales.log().abs().argmin()]

    @property
    def penalties(self) -> Tensor:
        """(C,) minus the log prior density of each output scale, per row."""
        away = self.output_scales.log() / _SPREAD
        return away.square() / (2 * len(self.point))

    def best(self) -> Choice:
        """The choice for this component alone."""
        tau = self.best_tau()
        return self.at(tau, self.best_scale(tau))

    def best_tau(self) -> int:
        """The index of the tau with the lowest NLL at an output scale of 1; among those that
        hardly differ from it, the nearest to 1 (if nothing was learnt, all are equally good).

        If no width improves on the point estimate: the widest that costs at most 0.3 %, but not
        wider than tau = 1.
        """
        nlls, point = -self.unscaled.mean(1), -self.point.mean()
        away = self.taus.log().abs()
        if nlls.min() <= point:
            alike = nlls <= self.near(nlls.min(), _ALIKE)
            return int(away.masked_fill(~alike, torch.inf).argmin())
        near = (nlls <= self.near(point, _COST)) & (self.taus >= 0.99)
        return int(near.nonzero()[0]) if near.any() else len(nlls) - 1

    def best_scale(self, tau: int) -> int:
        """The index of the output scale with the lowest penalised NLL at a tau."""
        return int((self.penalties - self.log_densities[tau].mean(1)).argmin())

    def at(self, tau: int, scale: int) -> Choice:
        """The choice by its indices."""
        noise = self.noises[tau].item()
        return Choice(
            self.taus[tau].item() / noise**2,
            noise,
            self.output_scales[scale].item(),
            -self.point.mean().item(),
            -self.log_densities[tau, scale].mean().item(),
        )


def best_output_scale(logits: Tensor, labels: Tensor) -> float:
    """The factor of logits (K, N, C) of K components under which their mixture has the highest log
    density at labels (N,), with the prior of output scales."""
    scales = torch.logspace(-0.9, 0.9, 61, dtype=logits.dtype)
    rows = torch.arange(len(labels))
    fits = [  # one scale at a time: of 500 classes, all together would take 600 MB
        (scale * logits).softmax(-1).mean(0)[rows, labels.long()].log().sum() for scale in scales
    ]
    penalties = (scales.log() / _SPREAD).square() / 2
    return scales[(torch.stack(fits) - penalties).argmax()].item()


class Width(NamedTuple):
    """The width of a fitted component.

    Attributes:
        reported: what its report says of it, by fields of `training.FitReport`.
        candidates: the densities of held-out rows, if any, by which a mixture chooses again.
    """

    reported: dict[str, Any]
    candidates: Candidates | None

    @classmethod
    def of(
        cls,
        model: Model,
        guide: LaplaceGuide,
        choice: Choice,
        rows: Jacobians,
        candidates: Candidates | None,
    ) -> Width:
        """That of a guide whose covariance has been set; `rows` are of some training examples."""
        likelihood, noise = model.likelihood, None
        if likelihood.noise_site:
            noise = likelihood.unit * likelihood.log_noise(guide.means()).exp().item()
        # KL and ELBO are those of the posterior with tau = 1, so that they compare with others'.
        prior, posterior = guide.joint_prior, guide.as_prior()
        before, after = guide.unpack(prior.normal.stddev), guide.unpack(posterior.normal.stddev)

        def divergence(q: JointPrior, p: JointPrior) -> float:
            return kl_divergence(q.normal, p.normal).item()

        reported = {
            "tau": choice.tau,
            "noise": noise,
            "output_scale": choice.output_scale if likelihood.softmax else None,
            "point_nll": choice.point_nll,
            "component_nll": choice.nll,
            "kl": {prior.name: divergence(posterior, prior)},
            "marginal_kl": {
                name: divergence(posterior.marginal([name]), prior.marginal([name]))
                for name in guide.shapes
            },
            "scales": {k: (after[k] / before[k]).log().mean().exp().item() for k in after},
            "expected_nll": _expected_nll(model, guide, posterior.normal.covariance, rows),
        }
        return cls(reported, candidates)


def _expected_nll(
    model: Model, guide: LaplaceGuide, covariance: Covariance, rows: Jacobians
) -> float:
    nlls, likelihood = [], model.likelihood
    for batch, outputs, derivatives in rows:
        assert batch.labels is not None
        if likelihood.noise_site:  # these are from before it was chosen
            mean = outputs.mean.clone()
            mean[:, outputs.of_noise] = likelihood.log_noise(guide.means())
            outputs = replace(outputs, mean=mean)
        noise = normal_points(DRAWS, outputs.mean.shape[1], seed=0).to(outputs.mean)
        values = outputs.draws(covariance.projected(derivatives), noise)
        nlls.append(-outputs.labels(values).log_prob(batch.labels).mean(0))
    return torch.cat(nlls).mean().item()


def best_together(components: Sequence[Candidates]) -> tuple[list[Choice], float, float]:
    """The widths and output scales of the components of one mixture.

    The widths are the best for each component alone, all made wider or narrower by the same factor:
    each alone also covers errors that the other components cover, so the mixture would be too wide.
    The factor has the lowest NLL of the mixture at output scales of 1; among those that hardly
    differ, it is the nearest to 1. If no factor improves on the mixture of the point estimates, any
    that costs at most 0.3 % will do.

    Then the output scales are the best for each component, all multiplied by the same factor: the
    mean of several predictions is less certain than each of them.

    Returns:
        The choices, and the NLL of the mixture of point estimates and of components.
    """
    near, point = components[0].near, _nll(torch.stack([c.point for c in components]))
    unscaled = torch.stack([c.unscaled for c in components])  # (K, T, N)
    moved = _moved([c.best_tau() for c in components], unscaled.shape[1])
    nlls = torch.stack([_nll(unscaled[range(len(taus)), taus]) for taus in moved])
    limit = near(nlls.min(), _ALIKE)
    if nlls.min() > point:
        limit = limit.maximum(near(point, _COST))
    taus = moved[int((nlls <= limit).nonzero()[0])]

    pairs, penalties = [*zip(components, taus, strict=True)], components[0].penalties
    densities = torch.stack([c.log_densities[tau] for c, tau in pairs])  # (K, C, N)
    moved = _moved([c.best_scale(tau) for c, tau in pairs], len(penalties))
    nlls = torch.stack([_nll(densities[range(len(scales)), scales]) for scales in moved])
    best = int((nlls + penalties[torch.tensor(moved)].mean(1)).argmin())
    chosen = [c.at(tau, scale) for (c, tau), scale in zip(pairs, moved[best], strict=True)]
    return chosen, point.item(), nlls[best].item()


def _moved(alone: Sequence[int], count: int) -> list[list[int]]:
    """Indices below `count`, all moved by the same number, the smallest numbers first."""
    shifts = sorted(range(1 - count, count), key=abs)
    return [[min(max(index + shift, 0), count - 1) for index in alone] for shift in shifts]


def _nll(log_densities: Tensor) -> Tensor:
    return -mean_density(log_densities).mean()


def mean_density(log_densities: Tensor) -> Tensor:
    """(B,) the log of the mean density over (S, B)."""
    return log_densities.double().logsumexp(0) - math.log(len(log_densities))
