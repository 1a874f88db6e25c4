"""The width and output scale of Laplace approximations, one or several, that suit held-out rows.

The predictive density of a mixture is the mean of its components' densities. So the choice needs
only the density of each held-out row, under each component, at each tau and output scale of a grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ...base.threads import seeded
from ...model.likelihoods.normal import LEAST_NOISE
from ...model.linearized import LinearOutputs, symmetric_noise

TAUS = torch.logspace(-4, 4, 21, dtype=torch.float64)
NOISES = torch.logspace(-0.6, 0.6, 25, dtype=torch.float64)
"""Noise scales that are tried where there is no closed form, as multiples of the one that suits the
point estimate."""
OUTPUT_SCALES = torch.logspace(-0.9, 0.9, 19, dtype=torch.float64)
"""Factors of the outputs of a softmax that are tried."""
_UNSCALED = torch.ones(1, dtype=torch.float64)
_SPREAD = 0.5  # prior sd of an output scale's logarithm, so that few rows hardly move it from 1
DRAWS = 256  # of the outputs, to evaluate a width
_COST = 0.003  # of the point estimate's NLL, or of a nat, at most (TFB; Shi et al. 2024)
_ALIKE = 0.001  # of the best NLL, or of a nat: smaller differences are ignored

Held = Sequence[tuple[LinearOutputs, Tensor]]
"""Outputs and labels of held-out rows, batch by batch."""


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


@dataclass(frozen=True)
class Width:
    """The width of a fitted component, and what its report says of it under the same names
    (`training.FitReport`).

    Attributes:
        candidates: the densities of held-out rows, if any, by which a mixture chooses again.
    """

    tau: float
    noise: float | None
    output_scale: float | None
    point_nll: float | None
    component_nll: float | None
    kl: dict[str, float]
    marginal_kl: dict[str, float]
    scales: dict[str, float]
    expected_nll: float
    candidates: Candidates | None

    def reported(self) -> dict[str, Any]:
        """Its fields by name, without the densities."""
        names = [field.name for field in fields(self) if field.name != "candidates"]
        return {name: getattr(self, name) for name in names}

    def chosen(self, choice: Choice, noise: float) -> Width:
        """Another choice, with the noise scale multiplied by `noise`. The KLs and the expected NLL
        stay those under the noise scale that the component would have alone."""
        return replace(
            self,
            tau=choice.tau,
            noise=None if self.noise is None else self.noise * noise,
            output_scale=None if self.output_scale is None else choice.output_scale,
            component_nll=choice.nll,
        )


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
    return -_mean(log_densities).mean()


def of_draws(
    taus: Tensor, spreads: Sequence[Sequence[Tensor]], held: Held, scaled: bool
) -> Candidates:
    """Candidates from draws of the outputs; if `scaled`, at every output scale.

    `spreads` are for each of the (T,) taus the (B, E, E) covariances of the outputs of the rows
    `held`, batch by batch.
    """
    scales = OUTPUT_SCALES if scaled else _UNSCALED
    forecast = partial(_at_scales, scales)
    densities = torch.stack([_densities(held, spread, forecast) for spread in spreads])
    point = _densities(held, None, partial(_at_scales, _UNSCALED))[0]
    ratings = held[0][0].model.likelihood.kind == "rating"
    return Candidates(taus, torch.ones_like(taus), scales, densities, point, ratings)


def _at_scales(scales: Tensor, outputs: LinearOutputs, values: Tensor) -> TorchDistribution:
    """Labels at each of C output scales."""
    factors = scales.to(values).reshape(-1, 1, 1, 1)
    return outputs.labels(values * torch.where(outputs.of_likelihood, 1.0, factors))


def _densities(
    held: Held,
    spreads: Sequence[Tensor] | None,
    forecast: Callable[[LinearOutputs, Tensor], TorchDistribution],
) -> Tensor:
    """(C, N) log densities of the labels under forecasts of batch shape (C, S, B), from (S, B, E)
    draws of the outputs; from the point estimate if there are no spreads."""
    densities = []
    for number, (outputs, labels) in enumerate(held):
        values = outputs.mean[None]
        if spreads is not None:
            with seeded(0):  # the same noise for every tau
                noise = symmetric_noise(DRAWS, outputs.mean.shape[1]).to(values)
            values = outputs.draws(spreads[number], noise)
        densities.append(_mean(forecast(outputs, values).log_prob(labels).movedim(1, 0)))
    return torch.cat(densities, 1).cpu()


def _mean(log_densities: Tensor) -> Tensor:
    """(B,) the log of the mean density over (S, B)."""
    return log_densities.double().logsumexp(0) - math.log(len(log_densities))


def with_constant_noise(
    taus: Tensor, spreads: Sequence[Sequence[Tensor]], held: Held, unit: float, free: bool
) -> Candidates:
    """Candidates for ratings with constant noise, in closed form; if it is `free`, with the best
    noise scale for every tau.

    With noise s in place of the trained s0, the precision tau P + (s0 / s)^2 N F is (s0 / s)^2
    times that of tau' = tau (s / s0)^2. So a rating has the variance s^2 (1 + v / s0^2), with v the
    variance of its mean under tau'. The best s^2 is the mean of squared errors / (1 + v / s0^2).
    s is a multiple of `unit`.
    """
    errors, trained = _errors(held)
    least = (LEAST_NOISE * unit / trained).square().max()

    def fitted(share: Tensor) -> tuple[Tensor, Tensor]:
        variance = trained.square() * (1 + share)
        square = (
            (errors.square() / variance).mean().maximum(least) if free else torch.ones_like(least)
        )
        return square.sqrt(), dist.Normal(0.0, (square * variance).sqrt()).log_prob(errors)

    shares = [
        torch.cat([batch[:, 0, 0] for batch in spread]).cpu().clamp_min(0) * (unit / trained) ** 2
        for spread in spreads
    ]
    noises, densities = map(torch.stack, zip(*map(fitted, shares), strict=True))
    _, point = fitted(torch.zeros_like(errors))
    return Candidates(taus, noises, _UNSCALED, densities[:, None], point, ratings=True)


def with_noise_by_text(taus: Tensor, spreads: Sequence[Sequence[Tensor]], held: Held) -> Candidates:
    """Candidates for ratings whose noise depends on the text, with the best noise scale for every
    tau, among `NOISES` times that which suits the point estimate's errors.

    As in `with_constant_noise`, the outputs vary s / s0 times as much as under tau'. This is exact
    for what ratings say about their mean; what they say about their noise does not depend on s.
    """
    errors, trained = _errors(held)
    noise = (errors / trained).square().mean().sqrt().clamp_min(LEAST_NOISE)
    noises = noise * NOISES
    forecast = partial(_at_noises, noises)
    densities = torch.stack([_densities(held, spread, forecast) for spread in spreads])
    best = densities.mean(-1).argmax(1)
    point = dist.Normal(0.0, noise * trained).log_prob(errors)
    densities = densities[torch.arange(len(taus)), best]
    return Candidates(taus, noises[best], _UNSCALED, densities[:, None], point, ratings=True)


def _errors(held: Held) -> tuple[Tensor, Tensor]:
    """(N,) errors of ratings under the point estimate, and the sds that it gives them."""
    parts = []
    for outputs, labels in held:
        normal = outputs.labels(outputs.mean)
        parts.append(torch.stack([labels - normal.mean, normal.stddev.expand(len(labels))]))
    errors, sds = torch.cat(parts, 1).double().cpu()
    return errors, sds


def _at_noises(noises: Tensor, outputs: LinearOutputs, values: Tensor) -> TorchDistribution:
    """Ratings at each of C factors of the noise scale."""
    factors = noises.to(values).reshape(-1, 1, 1, 1)
    away = (values - outputs.mean) * torch.where(outputs.of_noise, 1.0, factors)
    normal = outputs.labels(outputs.mean + away)
    return dist.Normal(normal.mean, factors.squeeze(-1) * normal.stddev)
