"""The width of a Laplace approximation: its covariance, measured around a trained point.

The precision is tau P + N F, with P the prior's precision and F the generalised Gauss-Newton
matrix, over the labels that the likelihood expects (no label of the training rows is looked at).
How much prior there is in it, tau, and the noise scale of ratings are those of the highest held-out
log density: the training rows cannot tell, as a network may have learnt them by heart. The mean is
the point's whatever tau is. In later rounds tau stays the first prior's, and what earlier rounds'
data have said counts once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor, nn
from torch.distributions import kl_divergence

from ..data import Examples
from ..data.batch import Batch
from ..distributions import Covariance, exact
from ..guides import LaplaceGuide
from ..guides.budget import GATHERED
from ..model.linearized import Outputs, jacobian, output_moments, symmetric_noise
from ..model.model import Model
from .candidates import DRAWS, TAUS, Candidates, Choice, best_together, of_draws, with_noise
from .curvature import Gathered, every
from .draws import seeded
from .passes import Feed
from .report import FitReport

__all__ = ["equal_effect", "refine", "settle", "widen"]

_EXAMPLES, _SCALED = 128, 32  # on which the curvature is measured, and the prior's scales
_BATCH = 16
_HELD_OUT = 256  # rows, at most, by which the width is chosen


@dataclass(frozen=True)
class Curvature:
    """N F in units of the prior's scale: diag(rest) + root root'."""

    rest: Tensor
    root: Tensor

    def times(self, factor: float) -> Curvature:
        """Of so many times as many examples."""
        return Curvature(factor * self.rest, factor**0.5 * self.root)


@singledispatch
def refine(
    guide: nn.Module,
    model: Model,
    examples: Examples,
    held_out: Examples | None,
    report: FitReport,
    open_scales: bool,
) -> Model:
    """Compute what a trained guide still lacks: the width of a Laplace approximation (`widen`), and
    nothing for other guides. The arguments are those of `widen`."""
    return model


@refine.register
def widen(
    guide: LaplaceGuide,
    model: Model,
    examples: Examples,
    held_out: Examples | None,
    report: FitReport,
    open_scales: bool,
) -> Model:
    """Give a trained guide its covariance, and add the results to the report.

    Args:
        guide: a trained point.
        model: the model, with the prior that the guide was fitted under.
        examples: the training data.
        held_out: labelled examples that choose tau and the ratings' noise. Without any, tau stays
            as it is (1 at first), unless `report.options` gives it.
        report: of the fit.
        open_scales: whether the prior leaves the sites' scales open (`equal_effect`).

    Returns:
        The model, with the prior that the covariance was computed with.
    """
    options = report.options
    with seeded(options.seed):
        if open_scales:
            prior = guide.recentre(
                guide.prior.loc, equal_effect(model, guide, examples, options.seed)
            )
            model = Model(model.network, prior, model.likelihood)
        curvature = measured(model, guide, examples, options.seed)
        guide.candidates = None
        choice = Choice(options.tau or guide.tau.item())
        if held_out is not None:
            guide.candidates = _candidates(model, guide, curvature, held_out, options.tau)
            choice = guide.candidates.best()
    learnt = curvature.times(choice.noise**-2)
    guide.spread(covariance(guide, learnt, choice.tau), choice.tau, choice.noise)
    with seeded(options.seed):
        _note(model, guide, choice, examples, report)
    return model


def settle(guides: Sequence[LaplaceGuide], reports: Sequence[FitReport]) -> tuple[float, float]:
    """Choose the widths of a mixture's components together.

    The components' disagreement already covers part of what each width covers alone.

    Returns:
        The held-out NLL of the mixture of points, and of the mixture of components.
    """
    every = [guide.candidates for guide in guides if guide.candidates is not None]
    choices, point_nll, nll = best_together(every)
    for guide, report, choice, own in zip(guides, reports, choices, every, strict=True):
        times = choice.noise / own.best().noise
        guide.retune(choice.tau, times)
        report.tau, report.component_nll = choice.tau, choice.nll
        if report.noise is not None:
            report.noise *= times
        guide.candidates = None
    return point_nll, nll


def _note(
    model: Model, guide: LaplaceGuide, choice: Choice, examples: Examples, report: FitReport
) -> None:
    report.tau, report.point_nll, report.component_nll = choice.tau, choice.point_nll, choice.nll
    means = guide.means()
    if model.likelihood.constant_noise:
        report.noise = model.likelihood.unit * means["noise.log_scale"].exp().item()
    # What was learnt is told by the posterior with tau = 1, whose ELBO other guides' compare with.
    plain = guide.as_prior()
    report.kl = {guide.latent: kl_divergence(plain.normal, guide.prior).item()}
    report.marginal_kl = guide.marginal_kl()
    before, after = guide.unpack(guide.prior.stddev), guide.unpack(plain.normal.stddev)
    report.scales = {k: (after[k] / before[k]).log().mean().exp().item() for k in after}
    report.points = []
    shown = _subset(examples, _SCALED, report.options.seed)
    nlls = []
    for _, batch in Feed(model, shown).prediction(_BATCH):
        assert batch.labels is not None
        outputs, spread = output_moments(model, means, plain.normal.covariance, batch)
        noise = symmetric_noise(DRAWS, outputs.mean.shape[1]).to(outputs.mean)
        values = outputs.draws(spread, noise)
        nlls.append(-outputs.labels(values).log_prob(batch.labels).mean(0))
    report.expected_nll = torch.cat(nlls).mean().item()


def _subset(examples: Examples, count: int, seed: int) -> Examples:
    if len(examples) <= count:
        return examples
    chosen = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
    return examples.subset(chosen[:count])


def _jacobians(
    model: Model, guide: LaplaceGuide, examples: Examples
) -> Iterator[tuple[Batch, Outputs, Tensor]]:
    """Batch by batch, with (B, E, D) derivatives in units of the prior's scale."""
    means = {name: value.detach() for name, value in guide.means().items()}
    for _, batch in Feed(model, examples).prediction(_BATCH):
        shown = batch.to(model.network.device)
        outputs, rows = jacobian(model, means, shown)
        yield shown, outputs, rows * guide.prior.covariance.scale


def _scores(outputs: Outputs) -> list[Tensor]:
    """(B, E) vectors, of which the outer products sum to the Fisher information of each example's
    outputs."""
    values = outputs.mean.detach().requires_grad_()
    with torch.enable_grad():
        return [
            torch.autograd.grad(total, values, retain_graph=True)[0]
            for total in (each.sum() for each in every(outputs.labels(values)))
            if total.requires_grad  # not a noise that is known
        ]


@torch.no_grad()
def measured(model: Model, guide: LaplaceGuide, examples: Examples, seed: int) -> Curvature:
    """N F at the guide's mean, on up to 512 of the examples."""
    shown = _subset(examples, _EXAMPLES, seed)
    weight = (len(examples) / len(shown)) ** 0.5
    like = guide.loc.detach()
    gathered = Gathered(like, guide.rank, guide.rank + GATHERED + _BATCH)
    ones = torch.full_like(like, weight)
    for _, outputs, rows in _jacobians(model, guide, shown):
        for score in _scores(outputs):
            gathered.add([torch.einsum("be,bed->bd", score, rows)], ones)
            if gathered.count >= guide.rank + GATHERED:
                gathered.shorten()
    root = gathered.root()
    return Curvature((gathered.diagonal - root.square().sum(-1)).clamp_min(0), root)


@torch.no_grad()
def equal_effect(model: Model, guide: LaplaceGuide, examples: Examples, seed: int) -> Covariance:
    """A prior in which every site of the network moves the outputs by as much as any other.

    One number a site: the variance of its weights is the inverse of the sum of its squared Jacobian
    entries, on average over outputs and examples, and of the number of sites. So the prior moves an
    output of the linearised network by an sd of 1. The likelihood's own sites keep their scales.
    """
    own = {site.name for site in model.likelihood.sites}
    shown = _subset(examples, _SCALED, seed)
    total = torch.zeros_like(guide.loc)
    count = 0
    means = guide.means()
    for _, batch in Feed(model, shown).prediction(_BATCH):
        outputs, rows = jacobian(model, means, batch.to(model.network.device))
        inside = rows[:, : math.prod(outputs.shape)]
        total += inside.square().sum((0, 1))
        count += inside.shape[0] * inside.shape[1]
    effects = {name: part.sum().item() for name, part in guide.unpack(total / count).items()}
    effects = {name: effect for name, effect in effects.items() if name not in own and effect > 0}
    scales = [
        torch.full_like(scale, (len(effects) * effects[name]) ** -0.5) if name in effects else scale
        for name, scale in guide.unpack(guide.prior.covariance.scale).items()
    ]
    return Covariance.diagonal(torch.cat([scale.flatten() for scale in scales]))


def covariance(guide: LaplaceGuide, curvature: Curvature, tau: float) -> Covariance:
    """The inverse of tau P + N F, of the leading directions and the diagonal of the rest.

    Under an earlier posterior as the prior its precision Q counts once beyond the first prior's:
    tau P + (Q - P) + N F.
    """
    prior = guide.prior.covariance
    with exact(prior.scale):
        root, rest = curvature.root, _diagonal(guide, tau) + curvature.rest
        if prior.rank:  # an earlier posterior's own directions
            both = torch.cat([root, prior.scale.unsqueeze(-1) * prior.precision_root()], 1)
            gathered = Gathered(rest, guide.rank, both.shape[1])
            gathered.add([both.mT.contiguous()], torch.ones_like(rest))
            root = gathered.root()
            rest = rest + (gathered.diagonal - root.square().sum(-1)).clamp_min(0)
        return Covariance.from_precision(
            rest / prior.scale.square(), root / prior.scale.unsqueeze(-1)
        )


def _diagonal(guide: LaplaceGuide, tau: float) -> Tensor:
    """(D,) of tau P + (Q - P), in units of the prior's scale."""
    first = (guide.prior.covariance.scale / guide.first_scale).square()
    return tau * first + (1 - first)


@torch.no_grad()
def _candidates(
    model: Model,
    guide: LaplaceGuide,
    curvature: Curvature,
    held_out: Examples,
    given: float | None,
) -> Candidates:
    """The component on held-out rows at every tau."""
    taus = TAUS if given is None else torch.tensor([given], dtype=torch.float64)
    shown = _subset(held_out, _HELD_OUT, 0)
    prior = guide.prior.covariance
    root = torch.cat([curvature.root, prior.scale.unsqueeze(-1) * prior.precision_root()], 1)
    # The inverse of d + R R' by Woodbury's identity: a small matrix for each tau.
    weights = []
    for tau in taus.tolist():
        diagonal = _diagonal(guide, tau) + curvature.rest
        inner = torch.eye(root.shape[1]).to(root) + root.mT @ (root / diagonal.unsqueeze(-1))
        weights.append((diagonal, torch.linalg.inv(inner.double())))
    spreads: list[list[Tensor]] = [[] for _ in weights]
    held: list[tuple[Outputs, Tensor]] = []
    for batch, outputs, rows in _jacobians(model, guide, shown):
        assert batch.labels is not None
        held.append((outputs, batch.labels))
        for number, (diagonal, inner) in enumerate(weights):
            scaled = rows / diagonal
            along = (scaled @ root).double()
            spreads[number].append((scaled @ rows.mT).double() - along @ inner @ along.mT)
    if model.likelihood.constant_noise and not prior.rank:  # earlier rounds had a noise of theirs
        return with_noise(taus, spreads, held, model.likelihood.unit)
    return of_draws(taus, spreads, held)
