"""Linearised Laplace approximation: a trained point, and around it the curvature of the loss."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ..data.batch import Batch
from ..distributions import Covariance
from ..errors import GuideError
from ..model.model import Model
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

    T and tau serve one round and its predictions. The next round's prior is the posterior with
    tau = 1, N(w*, (P + N F)^-1): what data have said, added to the first prior. So after R rounds
    the precision is tau P + N_1 F_1 + ... + N_R F_R.

    Args:
        model: its prior must be Normal at every site, or an earlier posterior of a joint guide.
        rank: the number of directions that are kept. Takes so many numbers a weight.
        names: the sites it covers; by default all.

    Attributes:
        measured: whether it has its covariance.
        tau: how often the first prior's precision is in it.
        first_scale: (D,) the first prior's sds.
        candidates: what held-out rows said of its width, until it is settled.

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
        self.candidates: Any = None
        self._likelihood = {site.name for site in model.likelihood.sites}
        self.register_buffer("measured", torch.tensor(False))
        self.register_buffer("tau", torch.tensor(1.0))
        self.register_buffer("first_scale", self.prior.covariance.scale.clone())
        self.measured: Tensor
        self.tau: Tensor
        self.first_scale: Tensor

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

    def spread(self, covariance: Covariance, tau: float = 1.0, noise: float = 1.0) -> None:
        """Be the posterior.

        Args:
            covariance: its own.
            tau: how often the first prior's precision is in it.
            noise: what the ratings' noise scale is multiplied by.
        """
        self._scale_noise(noise)
        self.covariance = covariance
        self.tau.fill_(tau)
        self.measured.fill_(True)

    def retune(self, tau: float, noise: float = 1.0) -> None:
        """Be another one around the same point: with so much of the first prior in it, and with
        ratings' noise so many times what it was."""
        own = retempered(self.covariance, self.first_scale, self.tau.item(), tau, noise**-2)
        self.spread(own, tau, noise)

    def _scale_noise(self, factor: float) -> None:
        if factor != 1:
            noise = self.means()["noise.log_scale"]
            self.move({"noise.log_scale": noise + math.log(factor)})

    def own_prior(self) -> JointPrior:
        """The prior that it was fitted under, a component's own."""
        return JointPrior(self.prior, self._shapes, self.latent)

    def under(self, prior: JointPrior) -> LaplaceGuide:
        """The same guide of a model with another prior."""
        twin = copy.copy(self)
        twin.prior, twin._joint, twin.latent = prior.normal, True, prior.name
        return twin

    def for_predictions(self, prior: JointPrior) -> JointPrior:
        """A prior made of this posterior with tau as the guide has it, in place of 1."""
        tau = self.tau.item()
        covariance = retempered(prior.normal.covariance, self.first_scale, 1.0, tau)
        return JointPrior(type(self.prior)(prior.normal.loc, covariance), self._shapes, prior.name)

    def prior_of_width(self, temperature: float) -> JointPrior:
        """The prior under which the linearised network's posterior is this very guide.

        For the first round that is N(w* + T / tau (m - w*), (tau P)^-1): its pull at w* is T times
        that of N(m, P^-1).
        """
        loc, own = self.loc.detach(), self.prior.covariance
        wide = retempered(own, self.first_scale, 1.0, self.tau.item())
        center = loc + temperature * wide.apply(own.solve(self.prior.loc - loc))
        return JointPrior(type(self.prior)(center, wide), self._shapes, self.latent)

    def recentre(self, loc: Tensor, covariance: Covariance) -> JointPrior:
        """Take N(loc, covariance) for the prior, and start there.

        Returns:
            It, for the model that the guide is to be fitted to.
        """
        normal = type(self.prior)(loc.clone(), covariance)
        prior = JointPrior(normal, self._shapes, self.latent)
        self.prior, self._joint, self.first_scale = normal, True, covariance.scale.clone()
        if not self.measured:
            self.covariance = covariance
        return prior

    def forward(self, batch: Batch | None = None) -> dict[str, Tensor]:
        if self.measured:
            return super().forward(batch)
        if not self._joint:
            return self._sites(self.unpack(self.loc))
        infer: Any = {"sites": self._shapes}
        return self.unpack(pyro.sample(self.latent, dist.Delta(self.loc, event_dim=1), infer=infer))

    def as_prior(self) -> JointPrior:
        if not self.measured:
            raise GuideError(
                "a Laplace approximation before its end is a point, so it cannot be a prior: fit "
                "it with bh.fit, or call widen(data) on its posterior"
            )
        covariance = retempered(self.covariance, self.first_scale, self.tau.item(), 1.0)
        normal = type(self.prior)(self.loc.detach().clone(), covariance)
        return JointPrior(normal, self._shapes, self.latent)

    @torch.no_grad()
    def grow(self, rows: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        first = self.unpack(self.first_scale)
        for name, (_, sds) in rows.items():
            first[name] = torch.cat([first[name], sds.to(first[name])])
        root = self.tau.sqrt()
        super().grow({name: (means, sds / root) for name, (means, sds) in rows.items()})
        self.first_scale = torch.cat([part.flatten() for part in first.values()])

    def scales(self) -> dict[str, Tensor]:
        return super().scales() if self.measured else {}


def retempered(
    covariance: Covariance, first_scale: Tensor, old: float, new: float, times: float = 1.0
) -> Covariance:
    """Of precision new P + times (Q - old P), from that of precision Q, P the first prior's.

    What data have said is Q - old P.
    """
    if new == old and times == 1:
        return covariance
    first = first_scale.pow(-2)
    learnt = (covariance.scale.pow(-2) - old * first).clamp_min(0)
    root = times**0.5 * covariance.precision_root()
    return Covariance.from_precision(new * first + times * learnt, root)
