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
        point_nll: held-out NLL of the point estimate, with the noise that suits it.
        nll: held-out NLL of the component.
    """

    tau: float
    noise: float = 1.0
    point_nll: float | None = None
    nll: float | None = None


@dataclass(frozen=True)
class Candidates:
    """The densities of N held-out rows under a component, at each of T taus.

    Attributes:
        taus: (T,) from wide to narrow.
        noises: (T,) the best noise scale at each tau, as a multiple of the trained one.
        log_densities: (T, N) of the labels.
        point: (N,) the same under the point estimate.
    """

    taus: Tensor
    noises: Tensor
    log_densities: Tensor
    point: Tensor

    def best(self) -> Choice:
        """The choice for this component alone."""
        return self.at(self.best_index())

    def best_index(self) -> int:
        """The lowest NLL; among those that hardly differ from it, the tau nearest to 1 (if nothing
        was learnt, all widths are equally good).

        If no width improves on the point estimate: the widest that costs at most 0.3 %, but not
        wider than tau = 1.
        """
        nlls, point = -self.log_densities.mean(1), -self.point.mean()
        away = self.taus.log().abs()
        if nlls.min() <= point:
            alike = nlls <= nlls.min() + _ALIKE * nlls.min().abs()
            return int(away.masked_fill(~alike, torch.inf).argmin())
        near = (nlls <= point + _COST * point.abs()) & (self.taus >= 0.99)
        return int(near.nonzero()[0]) if near.any() else len(nlls) - 1

    def at(self, index: int) -> Choice:
        """The choice of one tau."""
        noise = self.noises[index].item()
        nll, point = -self.log_densities[index].mean().item(), -self.point.mean().item()
        return Choice(self.taus[index].item() / noise**2, noise, point, nll)


def best_together(every: Sequence[Candidates]) -> tuple[list[Choice], float, float]:
    """The widths of the components of one mixture.

    They are the best for each component alone, all made wider or narrower by the same factor: each
    alone also covers errors that the other components cover, so the mixture would be too wide. The
    factor has the lowest NLL of the mixture; among those that hardly differ, it is the nearest to
    1. If no factor improves on the mixture of the point estimates, any that costs at most 0.3 %
    will do.

    Returns:
        The choices, and the NLL of the mixture of point estimates and of components.
    """
    own = [each.best_index() for each in every]
    count = max(len(each.taus) for each in every)
    shifts = sorted(range(1 - count, count), key=abs)
    moved = [
        [min(max(i + shift, 0), len(each.taus) - 1) for i, each in zip(own, every, strict=True)]
        for shift in shifts
    ]
    nlls = torch.tensor(
        [_nll([each.log_densities[i] for i, each in zip(at, every, strict=True)]) for at in moved],
        dtype=torch.float64,
    )
    point = _nll([each.point for each in every])
    limit = nlls.min() + _ALIKE * nlls.min().abs()
    if nlls.min() > point:
        limit = limit.clamp_min(point + _COST * abs(point))
    chosen = int((nlls <= limit).nonzero()[0])
    choices = [each.at(i) for i, each in zip(moved[chosen], every, strict=True)]
    return choices, point, nlls[chosen].item()


def _nll(log_densities: Sequence[Tensor]) -> float:
    return -_mean(torch.stack(list(log_densities))).mean().item()


def of_draws(taus: Tensor, spreads: Sequence[Sequence[Tensor]], held: Held) -> Candidates:
    """Candidates from draws of the outputs.

    Args:
        taus: (T,).
        spreads: for each tau the (B, E, E) covariances of the outputs, batch by batch.
        held: the rows.
    """
    densities = torch.stack([_densities(held, each) for each in spreads])
    return Candidates(taus, torch.ones_like(taus), densities, _densities(held, None))


def _densities(held: Held, spreads: Sequence[Tensor] | None) -> Tensor:
    """(N,) log densities; those of the point estimate if there are no spreads."""
    found = [
        _mean(outputs.labels(values).log_prob(labels))
        for outputs, values, labels in _draws(held, spreads)
    ]
    return torch.cat(found).cpu()


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
    return Candidates(taus, noises, densities, point)


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
    return Candidates(taus, noises[best], densities[torch.arange(len(taus)), best], point)


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
        away = (values - outputs.mean) * torch.where(outputs.of_noise(), 1.0, factors)
        normal = outputs.labels(outputs.mean + away)  # (F, S, B)
        scaled = Normal(normal.mean, factors.squeeze(-1) * normal.stddev)
        found.append(_mean(scaled.log_prob(labels).movedim(1, 0)))
    return torch.cat(found, 1).cpu()
