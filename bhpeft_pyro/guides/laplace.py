"""Linearised Laplace approximation: a trained point, and around it the curvature of the loss."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ..batch import Batch
from ..distributions import Covariance
from ..errors import GuideError
from ..model import Model
from ..priors import JointPrior
from .lowrank import LowRankGuide

__all__ = ["LaplaceGuide"]


class LaplaceGuide(LowRankGuide):
    """q(w) = N(w*, (tau P + N F)^-1) around a trained point w*, of the network linearised there.

    P is the prior's precision and F the generalised Gauss-Newton matrix of one example (MacKay
    1992; Immer, Korzepa and Bauer 2021), of which the leading directions are kept and the diagonal
    of the rest. With components it is one part of a mixture of Laplace approximations (Eschenhagen
    et al. 2021), each around a mode of its own.

    It minimises a generalised variational objective (Knoblauch, Jewson and Damoulas 2022) of the
    linearised network f(w*) + J (w - w*), in which the KL to the prior N(m, P^-1) is split into
    what its mean and what its covariance contribute, each with a prior scale of its own:

        N E_q[nll] + T / 2 (w* - m)' P (w* - m) + KL(N(0, S) || N(0, (tau P)^-1)).

    With T = tau = 1 that is the negative ELBO. Until `measured`, the guide is a point, and SVI at
    temperature T trains it by the first two terms. Given w*, the best S is known in closed form (to
    second order in the outputs), (tau P + N F)^-1: so it is measured by `fit`, or by
    `Posterior.widen`, and not trained.

    Args:
        model: its prior must be Normal at every site, or an earlier posterior of a joint guide.
        rank: the number of directions that are kept. Takes so many numbers a weight.
        names: the sites it covers; by default all.

    Attributes:
        measured: whether it has its covariance.

    >>> from bhpeft_pyro import fit
    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> model = tiny_model(())
    >>> options = {"components": 1, "max_steps": 3, "progress": False}
    >>> posterior = fit(model, "laplace", tiny_examples(), **options)
    >>> posterior.guide.scales()["head.bias"].shape
    torch.Size([2])
    """

    point = True

    def __init__(self, model: Model, rank: int = 16, names: Collection[str] | None = None) -> None:
        super().__init__(model, rank, names)
        held = [site.name for site in model.sites if site.name not in self._shapes]
        if held and names is None:
            raise GuideError(
                f"LaplaceGuide: the prior does not draw {', '.join(held)}, expected a Normal at "
                "every site; for other priors take 'normal' or 'lowrank'"
            )
        self._likelihood = {site.name for site in model.likelihood.sites}
        self.register_buffer("measured", torch.tensor(False))
        self.measured: Tensor

    @property
    def linear(self) -> bool:  # type: ignore[override]
        """A point predicts as the network does; with a covariance it is of the linearised one."""
        return bool(self.measured)

    def of_likelihood(self) -> Tensor:
        """(D,) 1 at the likelihood's own weights, such as a noise scale, and 0 elsewhere."""
        return self.at(self._likelihood).to(self.loc)

    def hold(self) -> None:
        """Be a point again, as it is while it is fitted."""
        self.measured.fill_(False)
        self.covariance = self.prior.covariance

    def spread(self, covariance: Covariance) -> None:
        """Be the posterior."""
        self.covariance = covariance
        self.measured.fill_(True)

    def own_prior(self) -> JointPrior:
        """The prior that it was fitted under, a component's own."""
        return JointPrior(self.prior, self._shapes, self.latent)

    def under(self, prior: JointPrior) -> LaplaceGuide:
        """The same guide of a model with another prior."""
        twin = copy.copy(self)
        twin.prior, twin._joint, twin.latent = prior.normal, True, prior.name
        return twin

    def prior_of_width(self, temperature: float, tau: float) -> JointPrior:
        """The prior N(m', (tau P)^-1) under which the linearised network's posterior has its mode
        at w*, where the prior that pulls at w* has the weight T: m' = w* + T / tau (m - w*)."""
        loc, own = self.loc.detach(), self.prior.covariance
        center = loc + temperature / tau * (self.prior.loc - loc)
        wider = Covariance(own.scale * tau**-0.5, own.axes, own.ratio)
        return JointPrior(type(self.prior)(center, wider), self._shapes, self.latent)

    def recentre(self, loc: Tensor, covariance: Covariance) -> JointPrior:
        """Take N(loc, covariance) for the prior, and start there.

        Returns:
            It, for the model that the guide is to be fitted to.
        """
        normal = type(self.prior)(loc.clone(), covariance)
        prior = JointPrior(normal, self._shapes, self.latent)
        self.prior, self._joint = normal, True
        if not self.measured:
            self.covariance = covariance
        return prior

    def forward(self, batch: Batch | None = None) -> dict[str, Tensor]:
        if self.measured:
            return super().forward(batch)
        values = self.unpack(self.loc)
        if self._joint:
            infer: Any = {"sites": self._shapes}
            return self.unpack(
                pyro.sample(self.latent, dist.Delta(self.loc, event_dim=1), infer=infer)
            )
        return self._sites(values)

    def as_prior(self) -> JointPrior:
        self._check()
        return super().as_prior()

    def scales(self) -> dict[str, Tensor]:
        return super().scales() if self.measured else {}

    def _check(self) -> None:
        if not self.measured:
            raise GuideError(
                "a Laplace approximation before its end is a point, so it cannot be a prior: fit "
                "it with bh.fit, or call widen(data) on its posterior"
            )
