"""How a fit treats a Laplace approximation: priors with scales and centres of their own, an
objective of its own, and a covariance around the trained point estimate.

tau, and the noise scale of ratings or the output scale of a softmax, maximise the log density of
held-out rows; training rows will not do, since a network may have memorised them. The mean does not
depend on tau.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ...base.distributions import Covariance, LowRankNormal
from ...base.fit_options import FitOptions
from ...base.isolation import seeded
from ...base.progress import work
from ...data import Examples
from ...data.batch import random_order
from ...model.model import Model
from ...priors import JointPrior, Prior
from ...priors.any_prior import joint
from ..guide import Guide
from ..strategy import Earlier, Strategy
from .choice_of_tau import Choice, Width, best_together
from .curvature import Information, Jacobians, equal_effect, jacobians, repeatable
from .held_out_densities import candidates_of
from .laplace_guide import LaplaceGuide

_EXAMPLES = 64  # at most, for the curvature
_SCALED = 32  # at most, for the prior's scales and the expected NLL: the first of those above
_LEAST = 1e-4  # share of the first prior's precision in later rounds, so that all sds are finite


class LaplaceStrategy(Strategy):
    """How a fit treats a `LaplaceGuide`."""

    centres_prior = True
    training_share = 0.8

    def __init__(self, guide: LaplaceGuide) -> None:
        self.guide: LaplaceGuide = guide

    def needs_held_out(self, options: FitOptions) -> bool:
        return options.temperature is None or options.tau is None

    @property
    def default_temperature(self) -> float:
        return 1.0 if self.guide.prior_information.is_zero else 0.0

    def drop_covariance(self) -> None:
        guide = self.guide
        for name, shape in guide.information_sizes(0).items():
            setattr(guide, name, guide.loc.new_zeros(shape))
        guide.measured.fill_(False)

    def centre_prior(self, values: Mapping[str, Tensor]) -> JointPrior:
        guide = self.guide
        parts = guide.unpack(guide.prior.loc) | dict(values)
        loc = torch.cat([v.detach().flatten() for v in parts.values()])
        covariance = guide.prior.covariance
        return guide.set_joint_prior(LowRankNormal(loc, covariance), covariance.scale)

    def reset_prior(self, model: Model) -> None:
        self.guide.set_prior(model)
        self.guide.first_scale = self.guide.prior.covariance.scale.clone()
        self.guide.tau.fill_(1.0)

    def set_first_prior_sds(self, sds: Mapping[str, Tensor], last: Guide) -> None:
        guide = self.guide
        parts = [sds[name].to(guide.loc).flatten() for name in guide.shapes]
        guide.set_first_scale(torch.cat(parts))
        if isinstance(last, LaplaceGuide):
            guide.tau.copy_(last.tau)

    def objective(
        self, model: Model, temperature: float, later: bool
    ) -> tuple[Model, float, float]:
        """In later rounds, the model under the last posterior with T P in place of the first
        prior's precision P, where T is the temperature (at least 1e-4)."""
        guide = self.guide
        covariance, weight = self._acting(temperature, later)
        normal = LowRankNormal(guide.prior.loc, covariance)
        if covariance is not guide.prior.covariance:
            model = model.with_prior(guide.as_model_samples(guide.joined(normal)))
        return model, weight, -normal.log_prob(normal.loc).item()

    @torch.no_grad()
    def average(self, share: float) -> None:
        """Labels that are new have no earlier weights, and take the whole step."""
        guide = self.guide
        # For a head alone, which is linear, the last posterior holds far from its mean too.
        if not guide.has_peft or guide.prior_information.is_zero:
            return
        last = guide.prior.loc.to(guide.loc)
        back = torch.full_like(last, 1 - share)
        parts, weights = guide.unpack(back), guide.unpack(last)
        if (head := weights.get("head.weight")) is not None:
            new = ~head.flatten(1).any(1)
            for name in ("head.weight", "head.bias"):
                if name in parts:
                    parts[name][new] = 0
        guide.loc.lerp_(last, torch.cat([part.flatten() for part in parts.values()]))

    def _acting(self, temperature: float, later: bool) -> tuple[Covariance, float]:
        """The covariance of the prior that acts on the mean, and the prior's weight."""
        guide, information = self.guide, self.guide.prior_information
        if not later or information.is_zero:
            return guide.prior.covariance, temperature
        return information.covariance(guide.first_scale, max(temperature, _LEAST)), 1.0

    def compute_width(
        self,
        model: Model,
        examples: Examples,
        held_out: Examples | None,
        options: FitOptions,
        earlier: Earlier | None = None,
        last_noise: Tensor | None = None,
    ) -> tuple[Model, Width]:
        """Compute the covariance of the trained guide, in place.

        Without held-out rows tau is that of the options or changes with the noise scale of ratings
        only (it is 1 at first), and the output scale is that of `earlier`.
        """
        guide, likelihood = self.guide, model.likelihood
        pooled = 1.0
        if last_noise is not None:
            pooled = (likelihood.log_noise(guide.means()) - last_noise).exp().item()
            guide.move(likelihood.with_log_noise(last_noise))
        trained = guide.unpack(guide.loc.detach())
        # Random examples for the prior's scales and the expected NLL; with the others for the
        # curvature.
        order = random_order(len(examples), options.seed)[:_EXAMPLES]
        first, *more = (examples.subset(part) for part in order.split(_SCALED))
        with seeded(options.seed), work("width", 2 + (held_out is not None)) as doing:
            again = repeatable(model, trained, first)
            if guide.joint_prior.open:  # what earlier data have contributed to it stays
                scale = equal_effect(model, guide.shapes, guide.first_scale, again())
                there = guide.prior_information.times((scale / guide.first_scale).square())
                normal = LowRankNormal(guide.prior.loc, there.covariance(scale, 1.0))
                model = model.with_prior(guide.set_joint_prior(normal, scale))
            prior = self._prior_information(model)
            doing.next()
            rest = [jacobians(model, trained, part, share=1 / len(more)) for part in more]
            curvature = Information.of(
                chain(again(), *rest),
                guide.first_scale,
                guide.rank,
                model.network.outputs,
                weight=len(examples) / (len(first) + sum(map(len, more))),
            )
            doing.next()
            candidates = None
            output_scale = 1.0 if earlier is None else earlier.output_scale
            choice = Choice(options.tau or guide.tau.item(), output_scale=output_scale)
            if held_out is not None:
                doing.name("choosing the width")
                candidates = candidates_of(model, guide, prior, curvature, held_out, options.tau)
                choice = candidates.best()
                doing.next()
        if last_noise is not None or (not prior.is_zero and choice.noise != 1):
            tau = choice.tau * choice.noise**2  # under the noise that all of this was measured with
            guide.set_information(curvature.plus(prior, guide.rank), tau)
            if earlier is not None and last_noise is not None:
                share = earlier.share(len(examples))
                noise = _besides_width(again(), guide.covariance, pooled, share)
                choice = Choice(tau / noise**2, noise)
            guide.retune(choice.tau, choice.noise)
        else:
            learnt = curvature.times(guide.information_factor(choice.noise))
            whole = learnt.plus(prior, guide.rank)
            guide.set_information(whole, choice.tau, choice.noise, choice.output_scale)
        with seeded(options.seed):
            return model, Width.of(model, guide, choice, again(), candidates)

    def _prior_information(self, model: Model) -> Information:
        """Of the prior, with what earlier ratings have contributed under the present noise scale:
        about their means it is inversely proportional to the noise variance."""
        guide, likelihood = self.guide, model.likelihood
        information = guide.prior_information
        if not (likelihood.constant_noise and likelihood.noise_site in guide.shapes):
            return information
        now, before = (
            likelihood.log_noise(guide.unpack(loc.detach())) for loc in (guide.loc, guide.prior.loc)
        )
        return information.times(guide.information_factor((now - before).exp().item()))

    def first_prior(self, before: Prior | None) -> Prior | None:
        prior = joint(before)
        if not self.guide.joint_prior.open or prior is None:
            return before
        scales = Covariance.diagonal(self.guide.first_scale)
        return self.guide.joined(LowRankNormal(prior.normal.loc, scales))

    def fitted_prior(self) -> JointPrior:
        return self.guide.joint_prior

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
        loc, tau = guide.loc.detach(), guide.tau.item()
        wide = self._prior_information(model).covariance(guide.first_scale, tau)
        acting, weight = self._acting(temperature, later)
        center = loc + weight * wide.apply(acting.solve(guide.prior.loc - loc))
        model = model.with_prior(guide.joined(LowRankNormal(center, wide)))
        there = LaplaceGuide(model, guide.rank)  # at an output scale of 1
        with torch.no_grad():
            there.loc.copy_(loc)
        there.set_covariance(guide.unscaled)
        return model, there, 1.0

    def for_predictions(self, model: Model) -> Model:
        """With this guide's tau and output scale."""
        guide, start = self.guide, LaplaceGuide(model)
        loc = guide.factors() * start.prior.loc
        information = Information.within(start.prior.covariance, guide.first_scale)
        wide = guide.scaled(information.covariance(guide.first_scale, guide.tau.item()))
        return model.with_prior(start.joined(LowRankNormal(loc, wide)))


def choose_together(
    guides: Sequence[Guide], widths: Sequence[Width]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Choose the widths of a mixture's components together, after each has one of its own.

    Args:
        guides: of each component; they change in place.
        widths: from `compute_width` with held-out rows, one for each component.

    Returns:
        What each component's report says of its new width (KL and ELBO stay those under the noise
        scale that it would have alone), and what that of the mixture says.
    """
    candidates = [width.candidates for width in widths if width.candidates is not None]
    choices, point_nll, nll = best_together(candidates)
    reports = []
    for guide, width, choice, rows in zip(guides, widths, choices, candidates, strict=True):
        times = choice.noise / rows.best().noise
        assert isinstance(guide, LaplaceGuide)
        guide.retune(choice.tau, times, choice.output_scale)
        said = {**width.reported, "tau": choice.tau, "component_nll": choice.nll}
        if said["noise"] is not None:
            said["noise"] *= times
        if said["output_scale"] is not None:
            said["output_scale"] = choice.output_scale
        reports.append(said)
    return reports, {"point_nll": point_nll, "component_nll": nll}


def around_point(model: Model, point: Guide) -> LaplaceGuide:
    """A Laplace approximation around a fitted point estimate of any family, without a covariance
    yet; of a `LaplaceGuide` the rank and tau stay."""
    if isinstance(point, LaplaceGuide):
        guide = LaplaceGuide(model, point.rank)
        guide.tau.copy_(point.tau)
    else:
        guide = LaplaceGuide(model)
    guide.move(point.strategy.prior_moments()[0])
    return guide


@torch.no_grad()
def _besides_width(rows: Jacobians, covariance: Covariance, pooled: float, share: float) -> float:
    """The noise scale of a later round as a multiple of the last one, under which its rows and the
    covariance of the weights are given: its errors are as large as noise and width together.

    The multiple is `pooled` if the width is left out; `share` is that of the round's rows among
    those of all rounds.
    """
    ratios = []
    for _, outputs, derivatives in rows:
        noise = outputs.labels(outputs.mean).variance / outputs.model.likelihood.unit**2
        ratios.append(covariance.projected(derivatives)[:, 0, 0] / noise)
    errors = pooled**2 - (1 - share)
    return (errors / (1 + torch.cat(ratios).mean().item()) + 1 - share) ** 0.5
