"""The densities of held-out rows under a Laplace approximation, at every width that is tried."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ...data import Examples
from ...data.batch import random_order
from ...model.likelihoods.normal import LEAST_NOISE
from ...model.linearized import LinearOutputs, normal_points
from ...model.model import Model
from .choice_of_tau import DRAWS, TAUS, Candidates, mean_density
from .curvature import Information, jacobians

if TYPE_CHECKING:
    from .laplace_guide import LaplaceGuide

OUTPUT_SCALES = torch.logspace(-0.9, 0.9, 19, dtype=torch.float64)
"""Factors of the outputs of a softmax that are tried."""
_UNSCALED = torch.ones(1, dtype=torch.float64)
_HELD_OUT = 256  # rows at most

Held = Sequence[tuple[LinearOutputs, Tensor]]
"""Outputs and labels of held-out rows, batch by batch."""


@torch.no_grad()
def candidates_of(
    model: Model,
    guide: LaplaceGuide,
    prior: Information,
    curvature: Information,
    held_out: Examples,
    given: float | None,
) -> Candidates:
    """The densities of held-out rows at every tau, or at the one that is given, from what is
    in the prior and what the round adds."""
    taus = TAUS if given is None else torch.tensor([given], dtype=torch.float64)
    shown = held_out
    if len(held_out) > _HELD_OUT:
        shown = held_out.subset(random_order(len(held_out))[:_HELD_OUT])
    root = torch.cat([curvature.root, prior.root], 1)
    # The inverse of d + R R' by Woodbury's identity: a small matrix for each tau.
    inverses = torch.stack([1 / (tau + prior.rest + curvature.rest) for tau in taus.tolist()])
    ones = torch.eye(root.shape[1]).to(root)
    inner = [
        torch.linalg.inv((ones + root.mT @ (root * inverse.unsqueeze(-1))).double())
        for inverse in inverses
    ]
    spreads: list[list[Tensor]] = [[] for _ in inner]
    held: list[tuple[LinearOutputs, Tensor]] = []
    trained, linear = guide.unpack(guide.loc.detach()), model.likelihood.linear_mean
    for batch, outputs, derivatives in jacobians(model, trained, shown, first=linear):
        assert batch.labels is not None
        rows = derivatives * guide.first_scale
        held.append((outputs, batch.labels))
        products = [(rows * row.unsqueeze(1)) @ inverses.mT for row in rows.unbind(1)]
        grams = torch.stack(products, 1).double().unbind(-1)  # for each tau (B, E, E)
        for number, (inverse, gram) in enumerate(zip(inverses, grams, strict=True)):
            along = (rows @ (root * inverse.unsqueeze(-1))).double()
            spreads[number].append(gram - along @ inner[number] @ along.mT)
    if linear:  # a tau that is given is for the trained noise
        free = model.likelihood.noise_site is not None and given is None
        return with_normal_noise(taus, spreads, held, free)
    return of_draws(taus, spreads, held, scaled=model.likelihood.softmax and given is None)


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
        if spreads is None:
            logs = forecast(outputs, outputs.mean[None]).log_prob(labels)
        else:
            # The same for every tau, so that differences between taus are not those of draws.
            noise = normal_points(DRAWS, outputs.mean.shape[1], seed=0).to(outputs.mean)
            with pyro.validation_enabled(False):  # a wide draw may give a rate of 0 or infinity
                values = outputs.draws(spreads[number], noise)
                logs = forecast(outputs, values).log_prob(labels)
            logs = logs.masked_fill(logs.isnan(), -torch.inf)  # under which no label is possible
        densities.append(mean_density(logs.movedim(1, 0)))
    return torch.cat(densities, 1).cpu()


def with_normal_noise(
    taus: Tensor, spreads: Sequence[Sequence[Tensor]], held: Held, free: bool
) -> Candidates:
    """Candidates for ratings with Normal noise and a linear mean, in closed form; if the noise is
    `free`, with the best factor of it for every tau.

    With k times the trained noise, the precision tau P + N F / k^2 is 1 / k^2 times that of tau' =
    tau k^2. So a rating with the trained noise s has the variance k^2 (s^2 + v), with v the
    variance of its mean under tau'. The best k^2 is the mean of squared errors / (s^2 + v). Where
    the noise depends on the text, this is exact for what ratings say about their mean; what they
    say about their noise does not depend on k.
    """
    unit = held[0][0].model.likelihood.unit
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


def _errors(held: Held) -> tuple[Tensor, Tensor]:
    """(N,) errors of ratings under the point estimate, and the sds that it gives them."""
    parts = []
    for outputs, labels in held:
        normal = outputs.labels(outputs.mean)
        parts.append(torch.stack([labels - normal.mean, normal.stddev.expand(len(labels))]))
    errors, sds = torch.cat(parts, 1).double().cpu()
    return errors, sds
