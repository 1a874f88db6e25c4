"""The linearised Laplace approximation: a trained point estimate with a covariance around it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Self

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...base.checks import warn
from ...base.distributions import Covariance, LowRankNormal
from ...base.fit_options import FitOptions
from ...base.values import Count, valid
from ...data.batch import Batch
from ...errors import GuideError
from ...model.model import Model
from ...priors import JointPrior, Prior, unpack
from ...priors.any_prior import joint, moved
from ..guide import NOISE_STEPS, Guide, adam_lr
from ..latent import joint_normal
from ..mean_field import ScaledAdam
from .curvature import Information
from .width import compute_width

_LEAST = 1e-4  # share of the first prior's precision in later rounds, so that all sds are finite


class LaplaceGuide(Guide):
    """q(w) = N(w*, (tau P + N F)^-1) around a trained point estimate w*, for the network linearised
    there.

    P is the prior's precision, N the number of examples, and F the generalised Gauss-Newton matrix
    of one (MacKay 1992; Immer, Korzepa and Bauer 2021), of which the leading directions and the
    diagonal of the rest are kept. Several such guides make a mixture of Laplace approximations
    (Eschenhagen et al. 2021).

    The guide minimises a generalised variational objective (Knoblauch, Jewson and Damoulas 2022)
    of the linearised network f(w*) + J (w - w*), in which the KL to the prior N(m, P^-1) is split
    into a part for the mean and a part for the covariance, each with a weight:

        N E_q[nll] + T / 2 (w* - m)' P (w* - m) + KL(N(0, S) || N(0, (tau P)^-1)).

    With T = tau = 1 this is the negative ELBO. SVI at temperature T trains w* by the first two
    terms. Given w*, the best S is (tau P + N F)^-1 to second order in the outputs, so `fit` or
    `Posterior.widen` computes it.

    The next round's prior is the posterior with tau = 1. In later rounds both T and tau multiply P,
    the precision of the first prior, and leave the information of earlier data as it is: in round R
    the precision tau P becomes tau P + N_1 F_1 + ... + N_(R-1) F_(R-1), and T P likewise. With
    T = 0, the default from 50 rows on, that is online EWC with the weight 1 (Schwarz et al. 2018).

    Args:
        model: its prior is an independent Normal at every site, or an earlier posterior of this
            family.
        rank: the number of directions of F that are kept; each takes one number per weight.

    Attributes:
        loc: (D,) the point estimate w*, in the order in which the prior samples the weights.
        joint_prior: a Normal over the same vector, `prior`, as a prior of the sites, which have
            `shapes` in this order. If it is open, `fit` sets its scales, `first_scale`, in every
            round.
        measured: whether the covariance has been computed.
        tau: the multiple of the first prior's precision in the covariance.
        output_scale: a factor of the network's outputs (one over a softmax's temperature; Guo et
            al. 2017). The outputs are linear in the head's weights, so draws of those, `means()`,
            `scales()` and `covariance` include the factor; `loc` and `as_prior()` do not.
        first_scale: (D,) sds of the first round's prior; where a later prior is wider, of that.
        information: what data have contributed since the first round's prior.

    Raises:
        GuideError: the prior is not an independent Normal at every site, or has observations.

    >>> from bhpeft_pyro import fit
    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> model = tiny_model(())
    >>> options = {"components": 1, "max_steps": 3, "progress": False}
    >>> posterior = fit(model, "laplace", tiny_examples(), **options)
    >>> posterior.guide.scales()["head.bias"].shape
    torch.Size([2])
    """

    point = True
    joint = True
    centres_prior = True
    rest: Tensor
    axes: Tensor
    strength: Tensor
    measured: Tensor
    tau: Tensor
    output_scale: Tensor
    first_scale: Tensor

    def __init__(self, model: Model, rank: int = 16) -> None:
        super().__init__()
        self.rank = valid(Count, "rank", rank)
        self.joint_prior, self._sampled, start = joint_normal(model)
        self.shapes = self.joint_prior.shapes
        self._likelihood = {site.name for site in model.likelihood.sites}
        self._noise = model.likelihood.noise_site or ""
        self.has_peft = bool(model.network.kinds)  # a head alone is linear anyway
        scaled = model.likelihood.softmax
        self._head = {site.name for site in model.sites if scaled and site.role == "head"}
        self.loc = nn.Parameter(start)
        for name, shape in self.information_sizes(0).items():
            self.register_buffer(name, start.new_zeros(shape))
        self.register_buffer("measured", torch.tensor(False))
        self.register_buffer("tau", start.new_tensor(1.0))
        self.register_buffer("output_scale", start.new_tensor(1.0))
        self.register_buffer("first_scale", self.prior.covariance.scale.clone())

    @property
    def prior(self) -> LowRankNormal:
        return self.joint_prior.normal

    @property
    def linear(self) -> bool:  # type: ignore[override]
        """Whether the covariance has been computed; before, the network itself predicts."""
        return bool(self.measured)

    def information_sizes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Of its tensors: `rest` besides `axes`, in units of the first prior's precision, and
        `strength` along them, in units of tau + rest."""
        size = len(self.loc)
        return {"rest": (size,), "axes": (size, rank), "strength": (rank,)}

    @property
    def unscaled(self) -> Covariance:
        """The covariance at an output scale of 1."""
        scale = self.first_scale * (self.tau + self.rest).rsqrt()
        return Covariance(scale, self.axes, (1 + self.strength).rsqrt())

    @property
    def information(self) -> Information:
        root = self.axes * self.strength.sqrt()
        return Information(self.rest, (self.tau + self.rest).sqrt().unsqueeze(-1) * root)

    @property
    def covariance(self) -> Covariance:
        return self.scaled(self.unscaled)

    def scaled(self, unscaled: Covariance) -> Covariance:
        """A covariance of the weights with the output scale in it."""
        if not self._head:
            return unscaled
        return replace(unscaled, scale=self.factors() * unscaled.scale)

    def factors(self) -> Tensor:
        """(D,) factors of the weights, by which the outputs get theirs; 1 during training."""
        return torch.where(self.measured & self.at(self._head), self.output_scale, 1.0)

    def forward(self, batch: Batch | None = None) -> dict[str, Tensor]:
        if self.measured:
            if batch is not None and self.has_peft:  # which model follows, only the caller knows
                warn(
                    "guide: these weights are draws for the network linearised around "
                    "guide.means(), and a model that is run under them (Predictive, SVI, "
                    "Importance) predicts something else; expected posterior.predict(texts)"
                )
            center = self.factors() * self.loc
            drawn: Any = LowRankNormal(center, self.covariance, validate_args=False)
        else:
            drawn = dist.Delta(self.loc, event_dim=1)
        # A model with a joint prior samples the vector too, and computes the sites from it.
        infer: Any = {"sites": self.shapes, "is_auxiliary": bool(self._sampled)}
        values = self.unpack(pyro.sample(self.joint_prior.name, drawn, infer=infer))
        return values | {
            name: pyro.sample(name, dist.Delta(values[name], event_dim=len(self.shapes[name])))
            for name in self._sampled
        }

    # How a fit treats it

    def drop_covariance(self) -> None:
        for name, shape in self.information_sizes(0).items():
            setattr(self, name, self.loc.new_zeros(shape))
        self.measured.fill_(False)

    def centre_prior(self, values: Mapping[str, Tensor]) -> JointPrior:
        parts = self.unpack(self.prior.loc) | dict(values)
        loc = torch.cat([v.detach().flatten() for v in parts.values()])
        covariance = self.prior.covariance
        return self.set_joint_prior(LowRankNormal(loc, covariance), covariance.scale)

    def objective(
        self, model: Model, temperature: float, later: bool
    ) -> tuple[Model, float, float]:
        """In later rounds, the model under the last posterior with T P in place of the first
        prior's precision P, where T is the temperature (at least 1e-4)."""
        covariance, weight = self._acting(temperature, later)
        normal = LowRankNormal(self.prior.loc, covariance)
        if covariance is not self.prior.covariance:
            model = model.with_prior(self.as_model_samples(self.joined(normal)))
        return model, weight, -normal.log_prob(normal.loc).item()

    def _acting(self, temperature: float, later: bool) -> tuple[Covariance, float]:
        """The covariance of the prior that acts on the mean, and the prior's weight."""
        information = self.prior_information
        if not later or information.is_zero:
            return self.prior.covariance, temperature
        return information.covariance(self.first_scale, max(temperature, _LEAST)), 1.0

    @torch.no_grad()
    def average(self, share: float) -> None:
        """Labels that are new have no earlier weights, and take the whole step."""
        # For a head alone, which is linear, the last posterior holds far from its mean too.
        if not self.has_peft or self.prior_information.is_zero:
            return
        last = self.prior.loc.to(self.loc)
        back = torch.full_like(last, 1 - share)
        parts, weights = self.unpack(back), self.unpack(last)
        if (head := weights.get("head.weight")) is not None:
            new = ~head.flatten(1).any(1)
            for name in ("head.weight", "head.bias"):
                if name in parts:
                    parts[name][new] = 0
        self.loc.lerp_(last, torch.cat([part.flatten() for part in parts.values()]))

    compute_width = compute_width

    def first_prior(self, before: Prior | None) -> Prior | None:
        prior = joint(before)
        if not self.joint_prior.open or prior is None:
            return before
        scales = Covariance.diagonal(self.first_scale)
        return self.joined(LowRankNormal(prior.normal.loc, scales))

    def target(self, model: Model, temperature: float, later: bool) -> tuple[Model, Guide, float]:
        """The linearised network, at temperature 1, under the prior of this mean and covariance.

        In the first round that prior is N(w* + T / tau (m - w*), (tau P)^-1): at w* its gradient
        is T times that of N(m, P^-1).
        """
        loc, tau = self.loc.detach(), self.tau.item()
        wide = self.information_before(model).covariance(self.first_scale, tau)
        acting, weight = self._acting(temperature, later)
        center = loc + weight * wide.apply(acting.solve(self.prior.loc - loc))
        model = model.with_prior(self.joined(LowRankNormal(center, wide)))
        there = LaplaceGuide(model, self.rank)  # at an output scale of 1
        with torch.no_grad():
            there.loc.copy_(loc)
        there.set_covariance(self.unscaled)
        return model, there, 1.0

    def information_before(self, model: Model) -> Information:
        """Of the prior, with what earlier ratings have contributed under the present noise scale:
        about their means it is inversely proportional to the noise variance."""
        likelihood, information = model.likelihood, self.prior_information
        if not (likelihood.linear_mean and likelihood.noise_site in self.shapes):
            return information
        now, before = (
            likelihood.log_noise(self.unpack(loc.detach())) for loc in (self.loc, self.prior.loc)
        )
        return information.times(self.information_factor((now - before).exp().item()))

    def under_prior(self, model: Model) -> Model:
        """With this guide's tau and output scale."""
        start = LaplaceGuide(model.with_prior(self.joint_prior))
        loc = self.factors() * start.prior.loc
        information = Information.within(start.prior.covariance, self.first_scale)
        wide = self.scaled(information.covariance(self.first_scale, self.tau.item()))
        return model.with_prior(start.joined(LowRankNormal(loc, wide)))

    # From round to round

    def set_prior(self, model: Model) -> None:
        prior, self._sampled, _ = joint_normal(model)
        if [*prior.shapes] != [*self.shapes]:
            raise GuideError(
                "LaplaceGuide: the prior is an earlier posterior with its sites in another order; "
                "expected that of this model"
            )
        self.joint_prior, self.shapes = prior, prior.shapes
        self.set_first_scale(self.first_scale)

    def set_first_scale(self, scale: Tensor) -> None:
        """Note the sds of the first round's prior, (D,)."""
        # Where a prior is wider than the first one, data have contributed nothing to it.
        self.first_scale = scale.maximum(self.prior.covariance.scale)

    def set_joint_prior(self, normal: LowRankNormal, first_scale: Tensor) -> JointPrior:
        """Take a Normal over all weights for the prior, and note the sds of the first round's; the
        prior is returned for the model."""
        self.joint_prior, self._sampled = self.joined(normal), ()
        self.set_first_scale(first_scale)
        return self.joint_prior

    def optimizers(self, options: FitOptions, examples: int) -> list[Optimizer]:
        # The noise scale starts at the sd of the ratings, far from that of the errors.
        sizes = 1 + (NOISE_STEPS - 1) * self.at(self._likelihood).to(self.loc)
        return [ScaledAdam(self.loc, sizes, adam_lr(options))]

    def unpack(self, flat: Tensor) -> dict[str, Tensor]:
        """`(*P, D)` to a tensor `(*P, *shape)` for each site."""
        return unpack(flat, self.shapes)

    def at(self, names: set[str]) -> Tensor:
        """(D,) whether a weight belongs to one of the sites `names`."""
        parts = [torch.full(s, n in names, device=self.loc.device) for n, s in self.shapes.items()]
        return torch.cat([part.flatten() for part in parts])

    def means(self) -> dict[str, Tensor]:
        return self.unpack(self.factors() * self.loc.detach())

    @torch.no_grad()
    def move(self, values: Mapping[str, Tensor]) -> None:
        factors = self.factors()
        by_site = self.unpack(values.get(self.joint_prior.name, factors * self.loc)) | dict(values)
        flat = torch.cat([by_site[n].to(self.loc).flatten() for n in self.shapes])
        self.loc.copy_(flat / factors)

    def scales(self) -> dict[str, Tensor]:
        return self.unpack(self.covariance.variance.sqrt()) if self.measured else {}

    def set_covariance(self, covariance: Covariance) -> None:
        """Set the covariance of all weights, at a tau and an output scale of 1."""
        self.set_information(Information.within(covariance, self.first_scale))

    def set_information(
        self, information: Information, tau: float = 1.0, noise: float = 1.0, scale: float = 1.0
    ) -> None:
        """Set what data have contributed, and with it the covariance, in which tau multiplies the
        first prior's precision; multiply the ratings' noise scale by `noise`; set that of the
        outputs."""
        if noise != 1:
            self.move({self._noise: self.means()[self._noise] + math.log(noise)})
        self.rest = information.rest
        self.axes, self.strength = information.leading(tau)
        self.tau.fill_(tau)
        self.output_scale.fill_(scale)
        self.measured.fill_(True)

    def retune(self, tau: float, noise: float = 1.0, output_scale: float | None = None) -> None:
        """Change tau and, if given, the output scale, and multiply the ratings' noise scale by
        `noise`."""
        scale = self.output_scale.item() if output_scale is None else output_scale
        if noise == 1 and tau == self.tau:  # the axes stay as they are
            self.output_scale.fill_(scale)
            return
        information = self.information.times(self.information_factor(noise))
        self.set_information(information, tau, noise, scale)

    def information_factor(self, noise: float) -> Tensor:
        """(D,) by how much a noise scale `noise` times as large multiplies the information of
        ratings about each weight: about their means, not about the noise scale itself."""
        return torch.where(self.at({self._noise}), 1.0, noise**-2)

    def joined(self, normal: LowRankNormal) -> JointPrior:
        """A Normal over all weights as a prior of their sites."""
        return JointPrior(normal, self.shapes, self.joint_prior.name, self.joint_prior.open)

    def as_model_samples(self, prior: JointPrior) -> Prior:
        """The prior of sites one by one, if the model samples them so."""
        return prior.independent() if self._sampled else prior

    def informed(self) -> bool:
        return not self.prior_information.is_zero

    @property
    def prior_information(self) -> Information:
        """What data have contributed to the prior."""
        within = Information.within(self.prior.covariance, self.first_scale)
        return replace(within, rest=within.rest.clamp_min(0))

    def as_prior(self) -> JointPrior:
        if not self.measured:
            raise GuideError(
                "this Laplace approximation has no covariance yet, so it cannot be a prior; in "
                "Python, fit it with bh.fit, or call widen(data) on its posterior"
            )
        covariance = self.unscaled
        if self.tau != 1:
            covariance = self.information.covariance(self.first_scale, 1.0)
        return self.joined(LowRankNormal(self.loc.detach().clone(), covariance))

    @torch.no_grad()
    def grow(self, rows: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        # A column for each weight.
        parts = self.unpack(torch.stack([self.loc, self.first_scale, self.rest, *self.axes.mT]))
        for name, (means, sds) in rows.items():
            nothing = means.new_zeros(1 + len(self.strength), *means.shape)
            more = torch.cat([torch.stack([means, sds]), nothing]).to(self.loc)
            parts[name] = torch.cat([parts[name], more], 1)
        self.shapes = {name: tuple(part.shape[1:]) for name, part in parts.items()}
        table = torch.cat([part.flatten(1) for part in parts.values()], 1)
        self.loc = nn.Parameter(table[0].clone())
        self.first_scale, self.rest = table[1:3].clone()
        self.axes = table[3:].mT.contiguous()

    def options(self) -> dict[str, Any]:
        return {"rank": self.rank}

    @classmethod
    def around(cls, model: Model, point: Guide) -> LaplaceGuide:
        """Without a covariance yet, around a fitted point estimate of any family; of another one
        the rank and tau stay."""
        if not isinstance(point, LaplaceGuide):
            guide = cls(model)
            guide.move(point.means())
            return guide
        guide = cls(model, point.rank)
        guide.tau.copy_(point.tau)
        guide.move(guide.unpack(point.loc.detach()))
        return guide

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert the prior with the guide."""
        super()._apply(fn, recurse)
        self.joint_prior = moved(self.joint_prior, fn)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Load a state whose number of directions may differ."""
        rank = len(state_dict.get(prefix + "strength", self.strength))
        for name, shape in self.information_sizes(rank).items():
            setattr(self, name, self.loc.new_zeros(shape))
        super()._load_from_state_dict(state_dict, prefix, *args)
