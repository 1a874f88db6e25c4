"""The scale of the PEFT weights' prior, found as the posterior is fitted."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from ..distributions import Covariance
from ..guides import LowRankGuide
from ..model import Model
from ..priors import FunctionSpaceNormal

__all__ = ["PriorScale"]

# How much wider than at last expected a fit starts. From below, the little that a narrow prior lets
# the mean learn asks for no wider one.
_START = 3.0
# A hyperprior, as if half a direction more had been seen, of the scale that is expected: data that
# say nothing are no reason to hold later rounds at the transformer, or to let them go anywhere.
_EXPECTED = 0.5


class PriorScale:
    """A factor of `FunctionSpaceNormal.change`, by empirical Bayes: MacKay's (1992) fixed point.

    Weights are the factor times z, which prior and guide are of. Along the K directions that data
    have told about, z has mean m and variance 1 - r under the guide, of the output side alone: what
    may as well be put down to the head does not tell of z. At the optimum of the evidence m^2 is r
    on average. Here each direction counts r-fold, as one about which data say little has in its
    mean mostly the noise of the last steps: the factor's square is multiplied by the sum of r m^2
    over that of r^2.

    Args:
        model: the model, with `Coordinates`.
        guide: of all latents, at its start.

    Attributes:
        model: the one to fit: the same, with coordinates of its own that carry the factor.
    """

    def __init__(self, model: Model, guide: LowRankGuide) -> None:
        assert model.network.coordinates is not None
        self.given, self.guide = model, guide
        # Other posteriors may predict with the same network meanwhile.
        self.coordinates = coordinates = copy.copy(model.network.coordinates)
        coordinates.gain = _START
        network = copy.copy(model.network)
        network.__dict__["_modules"] = {**network._modules, "coordinates": coordinates}
        self.model = Model(network, model.prior, model.likelihood)
        with torch.no_grad():  # the weights stay as they are
            start = torch.where(guide.at(coordinates.added), _START, 1.0)
            guide.loc.copy_(guide.prior.loc + (guide.loc - guide.prior.loc) / start)

    @classmethod
    def of(cls, model: Model, guide: object) -> PriorScale | None:
        """None if the scale is given, or nothing has one."""
        prior, coordinates = model.prior, model.network.coordinates
        is_open = isinstance(prior, FunctionSpaceNormal) and prior.change is None
        if is_open and coordinates and coordinates.added and isinstance(guide, LowRankGuide):
            return cls(model, guide)
        return None

    @torch.no_grad()
    def step(self) -> None:
        """Move the factor, once a covariance has been measured; the weights stay as they are."""
        guide = self.guide
        added = guide.at(self.coordinates.added)
        unit, covariance = guide.prior.covariance.scale, guide.covariance
        own = covariance.marginal(added.nonzero().squeeze(-1))
        along = ((guide.loc - guide.prior.loc)[added] / own.scale) @ own.axes
        told = 1 - own.ratio.square()
        expected = _EXPECTED / self.coordinates.gain**2
        square = (told @ along.square() + expected) / (told.square().sum() + _EXPECTED)
        factor = square.sqrt()
        self.coordinates.gain *= factor.item()
        factors = torch.where(added, factor, 1.0)
        guide.loc.copy_(guide.prior.loc + (guide.loc - guide.prior.loc) / factors)
        more = ((unit / covariance.scale).square() - 1) * factors.square()
        root = covariance.precision_root() * factors.unsqueeze(-1)
        guide.covariance = Covariance.from_precision((1 + more) / unit.square(), root)

    def settle(self) -> Model:
        """The model under the prior that was found; the guide becomes one of the weights."""
        prior, network, names = self.given.prior, self.given.network, self.coordinates.added
        assert isinstance(prior, FunctionSpaceNormal)
        start = next(prior.scale(site) for site in network.sites if site.name in names)
        factor = self.coordinates.gain
        self.guide.rescale(names, factor)
        model = Model(network, replace(prior, change=factor * start), self.given.likelihood)
        self.guide.follow(model)
        return model
