"""The width of a Laplace approximation that suits held-out rows, for one component or several.

The predictive density of a mixture is the mean of its components' densities. So the choice needs
only the density of each held-out row, under each component, at each tau of a grid.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Normal

from ..model.likelihoods.normal import LEAST_NOISE
from ..model.linearized import Outputs, symmetric_noise
from ..threads import seeded

TAUS = torch.logspace(-4, 4, 21, dtype=torch.float64)
NOISES = torch.logspace(-0.6, 0.6, 25, dtype=torch.float64)
"""Noise scales that are tried where there is no closed form, as multiples of the one that suits the
point estimate."""
OUTPUT_SCALES = torch.logspace(-0.9, 0.9, 19, dtype=torch.float64)
"""Factors of the outputs of a softmax that are tried."""
_UNSCALED = torch.ones(1, dtype=torch.float64)
_SPREAD = 1.0  # prior sd of an output scale's logarithm, so that few rows hardly move it from 1
DRAWS = 256  # of the outputs, to evaluate a width
_COST = 0.003  # of the point estimate's NLL, at most (TFB; Shi et al. 2024)
_ALIKE = 0.001  # of the best NLL: smaller differences are ignored

Held = Sequence[tuple[Outputs, Tensor]]
"""Outputs and labels of held-out rows, batch by batch."""


@dataclass(frozen=True)
class Choice:
    """A chosen width.

    Attributes:
        tau: the multiple of the first prior's precision in the covariance.
        noise: the ratings' noise scale, as a multiple of the trained one.
        output_scale: the factor of the outputs in predictions.
        point_nll: held-out NLL of the point estimate, with the noise or output scale that suits it.
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
        output_scales: (C,).
        log_densities: (T, C, N) of the labels.
        point: (C, N) the same under the point estimate.
    """

    taus: Tensor
    noises: Tensor
    output_scales: Tensor
    log_densities: Tensor
    point: Tensor

    @property
    def penalties(self) -> Tensor:
        """(C,) minus the log prior density of each output scale, per row."""
        away = self.output_scales.log() / _SPREAD
        return away.square() / (2 * self.point.shape[-1])

    @property
    def point_index(self) -> int:
        """The output scale that suits the point estimate."""
        return int(_best(-self.point.mean(1), self.penalties)[1])

    def best(self) -> Choice:
        """The choice for this component alone."""
        return self.at(*self.best_index())

    def best_index(self) -> tuple[int, int]:
        """Of tau and of the output scale, which is the best for each tau: the lowest NLL; among the
        taus that hardly differ from it, the nearest to 1 (if nothing was learnt, all widths are
        equally good).

        If no width improves on the point estimate: the widest that costs at most 0.3 %, but not
        wider than tau = 1.
        """
        nlls, scales = _best(-self.log_densities.mean(-1), self.penalties)
        point = -self.point[self.point_index].mean()
        away = self.taus.log().abs()
        if nlls.min() <= point:
            alike = nlls <= nlls.min() + _ALIKE * nlls.min().abs()
            index = int(away.masked_fill(~alike, torch.inf).argmin())
        else:
            near = (nlls <= point + _COST * point.abs()) & (self.taus >= 0.99)
            index = int(near.nonzero()[0]) if near.any() else len(nlls) - 1
        return index, int(scales[index])

    def at(self, tau: int, scale: int) -> Choice:
        """The choice by its indices."""
        noise = self.noises[tau].item()
        return Choice(
            self.taus[tau].item() / noise**2,
            noise,
            self.output_scales[scale].item(),
            -self.point[self.point_index].mean().item(),
            -self.log_densities[tau, scale].mean().item(),
        )


def best_together(every: Sequence[Candidates]) -> tuple[list[Choice], float, float]:
    """The widths and output scales of the components of one mixture.

    They are the best for each component alone, all widths made wider or narrower by the same
    factor: each alone also covers errors that the other components cover, so the mixture would be
    too wide. Likewise all output scales change by the same factor: the mean of several predictions
    is less certain than each of them. The factors have the lowest NLL of the mixture; among those
    of the width that hardly differ, it is the nearest to 1. If none improves on the mixture of the
    point estimates, any that costs at most 0.3 % will do.

    Returns:
        The choices, and the NLL of the mixture of point estimates and of components.
    """
    own, penalties = [each.best_index() for each in every], every[0].penalties
    of_points = [each.point for each in every]
    point, _ = _together(of_points, [each.point_index for each in every], penalties)
    found = []
    count = max(len(each.taus) for each in every)
    for shift in sorted(range(1 - count, count), key=abs):
        taus = [_within(at + shift, each.taus) for (at, _), each in zip(own, every, strict=True)]
        densities = [each.log_densities[at] for at, each in zip(taus, every, strict=True)]
        found.append((taus, *_together(densities, [scale for _, scale in own], penalties)))
    nlls = torch.tensor([nll for _, nll, _ in found], dtype=torch.float64)
    limit = nlls.min() + _ALIKE * nlls.min().abs()
    if nlls.min() > point:
        limit = limit.clamp_min(point + _COST * abs(point))
    taus, nll, scales = found[int((nlls <= limit).nonzero()[0])]
    return [each.at(*at) for *at, each in zip(taus, scales, every, strict=True)], point, nll


def _together(
    densities: Sequence[Tensor], own: Sequence[int], penalties: Tensor
) -> tuple[float, list[int]]:
    """The lowest penalised NLL of a mixture whose output scales all change by one factor.

    Args:
        densities: (C, N) log densities, for each component.
        own: the index of its output scale before.
        penalties: (C,).

    Returns:
        The NLL, and the indices of the output scales.
    """
    factors = range(1 - len(penalties), len(penalties))
    tried = [[_within(at + factor, penalties) for at in own] for factor in factors]
    each = [zip(at, densities, strict=True) for at in tried]
    nlls = torch.stack([-_mean(torch.stack([d[i] for i, d in at])).mean() for at in each])
    best = int((nlls + penalties[torch.tensor(tried)].mean(1)).argmin())
    return nlls[best].item(), tried[best]


def _within(index: int, values: Tensor) -> int:
    return min(max(index, 0), len(values) - 1)


def _best(nlls: Tensor, penalties: Tensor) -> tuple[Tensor, Tensor]:
    """(...,) of NLLs (..., C) that of the lowest sum with its penalty, and the index."""
    at = (nlls + penalties).argmin(-1, keepdim=True)
    return nlls.gather(-1, at).squeeze(-1), at.squeeze(-1)


def of_draws(
    taus: Tensor, spreads: Sequence[Sequence[Tensor]], held: Held, scaled: bool
) -> Candidates:
    """Candidates from draws of the outputs.

    Args:
        taus: (T,).
        spreads: for each tau the (B, E, E) covariances of the outputs, batch by batch.
        held: the rows.
        scaled: whether the output scale is chosen too.
    """
    scales = OUTPUT_SCALES if scaled else _UNSCALED
    densities = torch.stack([_densities(held, each, scales) for each in spreads])
    point = _densities(held, None, scales)
    return Candidates(taus, torch.ones_like(taus), scales, densities, point)


def _densities(held: Held, spreads: Sequence[Tensor] | None, scales: Tensor) -> Tensor:
    """(C, N) log densities at each output scale; those of the point estimate if there are no
    spreads."""
    found = []
    for outputs, values, labels in _draws(held, spreads):
        each = scales.to(values).reshape(-1, 1, 1, 1)
        scaled = outputs.labels(values * torch.where(outputs.of_likelihood(), 1.0, each))
        found.append(_mean(scaled.log_prob(labels).movedim(1, 0)))
    return torch.cat(found, 1).cpu()


def _draws(
    held: Held, spreads: Sequence[Tensor] | None
) -> Iterator[tuple[Outputs, Tensor, Tensor]]:
    """Batch by batch the outputs, draws of them, (S, B, E), and the labels."""
    for number, (outputs, labels) in enumerate(held):
        values = outputs.mean[None]
        if spreads is not None:
            with seeded(0):  # the same noise for every tau
                noise = symmetric_noise(DRAWS, outputs.mean.shape[1]).to(values)
            values = outputs.draws(spreads[number], noise)
        yield outputs, values, labels


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

    Args:
        taus, spreads, held: as for `of_draws`.
        unit: of the ratings; the noise scale is a multiple of it.
        free: whether the noise scale is chosen too.
    """
    errors, trained = _errors(held)
    least = (LEAST_NOISE * unit / trained).square().max()

    def fitted(share: Tensor) -> tuple[Tensor, Tensor]:
        variance = trained.square() * (1 + share)
        square = (
            (errors.square() / variance).mean().maximum(least) if free else torch.ones_like(least)
        )
        return square.sqrt(), Normal(0.0, (square * variance).sqrt()).log_prob(errors)

    shares = [
        torch.cat([each[:, 0, 0] for each in one]).cpu().clamp_min(0) * (unit / trained) ** 2
        for one in spreads
    ]
    noises, densities = (torch.stack(each) for each in zip(*map(fitted, shares), strict=True))
    _, point = fitted(torch.zeros_like(errors))
    return Candidates(taus, noises, _UNSCALED, densities[:, None], point[None])


def with_noise_by_text(taus: Tensor, spreads: Sequence[Sequence[Tensor]], held: Held) -> Candidates:
    """Candidates for ratings whose noise depends on the text, with the best noise scale for every
    tau, among `NOISES` times that which suits the point estimate's errors.

    As in `with_constant_noise`, the outputs vary s / s0 times as much as under tau'. This is exact
    for what ratings say about their mean; what they say about their noise does not depend on s.
    """
    errors, trained = _errors(held)
    noise = (errors / trained).square().mean().sqrt().clamp_min(LEAST_NOISE)
    noises = noise * NOISES
    densities = torch.stack([_at_noises(held, each, noises) for each in spreads])
    best = densities.mean(-1).argmax(1)
    point = Normal(0.0, noise * trained).log_prob(errors)
    found = densities[torch.arange(len(taus)), best]
    return Candidates(taus, noises[best], _UNSCALED, found[:, None], point[None])


def _errors(held: Held) -> tuple[Tensor, Tensor]:
    """(N,) errors of ratings under the point estimate, and the sds that it gives them."""
    parts = []
    for outputs, labels in held:
        normal = outputs.labels(outputs.mean)
        parts.append(torch.stack([labels - normal.mean, normal.stddev.expand(len(labels))]))
    errors, sds = torch.cat(parts, 1).double().cpu()
    return errors, sds


def _at_noises(held: Held, spreads: Sequence[Tensor], noises: Tensor) -> Tensor:
    """As `_densities`, for each of F factors of the noise scale: (F, N)."""
    found = []
    for outputs, values, labels in _draws(held, spreads):
        factors = noises.to(values).reshape(-1, 1, 1, 1)
        own = outputs.of_likelihood("noise.log_scale")
        away = (values - outputs.mean) * torch.where(own, 1.0, factors)
        normal = outputs.labels(outputs.mean + away)  # (F, S, B)
        scaled = Normal(normal.mean, factors.squeeze(-1) * normal.stddev)
        found.append(_mean(scaled.log_prob(labels).movedim(1, 0)))
    return torch.cat(found, 1).cpu()
