"""How a fit treats a Laplace approximation: priors with scales and centres of their own, an
objective of its own, and a covariance that is computed after training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...base.distributions import Covariance, LowRankNormal
from ...base.fit_options import FitOptions
from ...data import Examples
from ...model.model import Model
from ...priors import JointPrior, Prior
from ..guide import Guide
from ..strategy import Strategy
from .choice import Width
from .laplace_guide import LaplaceGuide
from .precision import Precision
from .width import choose_together, compute_width

_LEAST = 1e-4  # share of the first prior's precision in later rounds, so that all sds are finite


class LaplaceStrategy(Strategy):
    """How a fit treats a `LaplaceGuide`."""

    centres_prior = True
    training = 0.8

    def __init__(self, guide: LaplaceGuide) -> None:
        self.guide: LaplaceGuide = guide

    def needs_held_out(self, options: FitOptions) -> bool:
        return options.temperature is None or options.tau is None

    @property
    def default_temperature(self) -> float:
        return 0.0 if self.guide.informed else 1.0

    def drop_covariance(self) -> None:
        self.guide.measured.fill_(False)
        self.guide.unscaled = self.guide.prior.covariance

    def centre_prior(self, values: Mapping[str, Tensor]) -> JointPrior:
        return self.guide.centre_prior(values)

    def reset_prior(self, model: Model) -> None:
        self.guide.reset_prior(model)

    def set_first_prior_sds(self, sds: Mapping[str, Tensor], last: Guide) -> None:
        self.guide.set_first_prior_sds(sds)
        if isinstance(last, LaplaceGuide):
            self.guide.tau.copy_(last.tau)

    def objective(
        self, model: Model, temperature: float, later: bool
    ) -> tuple[Model, float, float]:
        """In later rounds, the model under the last posterior with T P in place of the first
        prior's precision P, where T is the temperature (at least 1e-4)."""
        guide = self.guide
        covariance, weight = self._acting(temperature, later)
        normal = LowRankNormal(guide.prior.loc, covariance)
        if covariance is not guide.prior.covariance:
            model = model.with_prior(guide.sampled_as_model_does(normal))
        return model, weight, -normal.log_prob(normal.loc).item()

    def _acting(self, temperature: float, later: bool) -> tuple[Covariance, float]:
        """The covariance of the prior that acts on the mean, and the prior's weight."""
        if not (later and self.guide.informed):
            return self.guide.prior.covariance, temperature
        return self.guide.precision.at(max(temperature, _LEAST)), 1.0

    def compute_width(
        self,
        model: Model,
        examples: Examples,
        held_out: Examples | None,
        options: FitOptions,
        output_scale: float | None = None,
    ) -> tuple[Model, Width]:
        return compute_width(self.guide, model, examples, held_out, options, output_scale)

    def choose_together(
        self, guides: Sequence[Sequence[Guide]], widths: Sequence[Width]
    ) -> tuple[list[Width], float, float]:
        laplace = [[g for g in some if isinstance(g, LaplaceGuide)] for some in guides]
        return choose_together(laplace, widths)

    def first_prior(self, before: Prior | None) -> Prior | None:
        if not self.guide.open or not isinstance(before, JointPrior):
            return before
        scales = Covariance.diagonal(self.guide.first_scale)
        return self.guide.joined(LowRankNormal(before.normal.loc, scales))

    def fitted_prior(self) -> JointPrior:
        return self.guide.joined(self.guide.prior)

    def prior_moments(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        guide = self.guide
        sds = guide.unpack(guide.as_prior().normal.stddev) if guide.measured else {}
        return guide.unpack(guide.loc.detach().clone()), sds

    def target(self, model: Model, temperature: float, later: bool) -> tuple[Model, Guide, float]:
        """The linearised network, at temperature 1, under the prior of this mean and covariance.

        In the first round that prior is N(w* + T / tau (m - w*), (tau P)^-1): at w* its gradient
        is T times that of N(m, P^-1).
        """
        guide = self.guide
        loc, wide = guide.loc.detach(), guide.precision.at(guide.tau.item())
        acting, weight = self._acting(temperature, later)
        center = loc + weight * wide.apply(acting.solve(guide.prior.loc - loc))
        model = model.with_prior(guide.joined(LowRankNormal(center, wide)))
        there = LaplaceGuide(model, guide.rank)  # at an output scale of 1
        with torch.no_grad():
            there.loc.copy_(loc)
        there.set_covariance(guide.unscaled)
        return model, there, 1.0

    def for_predictions(self, model: Model) -> tuple[Model, dict[str, Tensor]]:
        """With this guide's tau and output scale, around the mean of the prior."""
        guide, start = self.guide, LaplaceGuide(model)
        loc = guide.factors() * start.prior.loc
        precision = Precision(start.prior.covariance, guide.first_scale)
        wide = guide.scaled(precision.at(guide.tau.item()))
        return model.with_prior(start.joined(LowRankNormal(loc, wide))), start.unpack(loc)
