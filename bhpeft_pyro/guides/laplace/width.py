"""The width of a Laplace approximation: its covariance around a trained point estimate.

The precision is tau P + N F, with P the prior's precision and F the generalised Gauss-Newton matrix
of one example, averaged over the labels that the likelihood expects. tau, and the noise scale of
ratings or the output scale of a softmax, maximise the log density of held-out rows; training rows
will not do, since a network may have memorised them. The mean does not depend on tau. In later
rounds tau still multiplies the first prior's precision only, and the information of earlier data
counts once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from ...base.distributed import map_over_ranks
from ...base.distributions import Covariance, exact
from ...base.fit_options import FitOptions
from ...base.progress import tracked, work
from ...base.threads import seeded
from ...data import Examples
from ...data.batch import Batch
from ...model.cached_batches import CachedBatches
from ...model.linearized import LinearOutputs, jacobian, symmetric_noise
from ...model.model import Model
from ..budget import examples_at_once, rows_kept
from .choice import (
    DRAWS,
    TAUS,
    Candidates,
    Choice,
    Width,
    best_together,
    of_draws,
    with_constant_noise,
    with_noise_by_text,
)
from .curvature import Curvature, Gathered, Jacobians, measured
from .laplace_guide import LaplaceGuide

_EXAMPLES = 64  # at most, for the curvature
_SCALED = 32  # at most, for the prior's scales and the expected NLL: the first of those above
_HELD_OUT = 256  # rows at most, for the choice of the width


def compute_width(
    guide: LaplaceGuide,
    model: Model,
    examples: Examples,
    held_out: Examples | None,
    options: FitOptions,
    output_scale: float | None = None,
) -> tuple[Model, Width]:
    """Compute the covariance of a trained guide, in place.

    Args:
        guide: the guide, whose mean is trained.
        model: the model, with the prior that the guide was fitted under.
        examples: the training data.
        held_out: labelled examples that choose tau and the noise or output scale. Without them tau
            is that of the options, or does not change (it is 1 at first), and the output scale is
            the one given, or 1: an earlier round's is of a fit that stopped at another step.
        options: of the fit.
        output_scale: of an earlier fit of this round.

    Returns:
        The model, with the prior that the covariance was computed with; and what was found.
    """
    first, more = _sampled(examples, options.seed)
    with seeded(options.seed), work("width", 2 + (held_out is not None)) as doing:
        again = _repeatable(model, guide, first)
        if guide.open:
            model = model.with_prior(guide.rescale(equal_effect(model, guide, again())))
        doing.next()
        each = [_jacobians(model, guide, part, share=1 / len(more)) for part in more]
        rows = chain(again(), *each)
        weight = len(examples) / (len(first) + sum(map(len, more)))
        curvature = measured(model, guide, rows, weight)
        doing.next()
        candidates = None
        choice = Choice(options.tau or guide.tau.item(), output_scale=output_scale or 1.0)
        if held_out is not None:
            doing.name("choosing the width")
            candidates = _candidates(model, guide, curvature, held_out, options.tau)
            choice = candidates.best()
            doing.next()
    learnt = curvature.times(guide.information_factor(choice.noise))
    own = covariance(guide, learnt, choice.tau)
    guide.set_covariance(own, choice.tau, choice.noise, choice.output_scale)
    with seeded(options.seed):
        return model, _width(model, guide, choice, again(), candidates)


def choose_together(
    guides: Sequence[Sequence[LaplaceGuide]], widths: Sequence[Width]
) -> tuple[list[Width], float, float]:
    """Choose the widths and output scales of a mixture's components together (`best_together`).

    Args:
        guides: of each component, with replay both of its guides; their covariances change in
            place.
        widths: from `compute_width` with held-out rows, one per component.

    Returns:
        The new widths, and the held-out NLL of the mixture of point estimates and of components.
    """
    candidates = [width.candidates for width in widths if width.candidates is not None]
    choices, point_nll, nll = best_together(candidates)
    chosen = []
    for each, width, choice, own in zip(guides, widths, choices, candidates, strict=True):
        times = choice.noise / own.best().noise
        for guide in each:
            guide.retune(choice.tau, times, choice.output_scale)
        chosen.append(width.chosen(choice, times))
    return chosen, point_nll, nll


def _width(
    model: Model,
    guide: LaplaceGuide,
    choice: Choice,
    rows: Jacobians,
    candidates: Candidates | None,
) -> Width:
    """What a report says of a guide whose covariance has been set."""
    likelihood, noise = model.likelihood, None
    if likelihood.noise_site:
        noise = likelihood.unit * likelihood.log_noise(guide.means()).exp().item()
    # KL and ELBO are those of the posterior with tau = 1, so that they compare with other guides'.
    plain, prior = guide.as_prior(), guide.joined(guide.prior)
    before, after = guide.unpack(guide.prior.stddev), guide.unpack(plain.normal.stddev)
    return Width(
        tau=choice.tau,
        noise=noise,
        output_scale=choice.output_scale if likelihood.softmax else None,
        point_nll=choice.point_nll,
        component_nll=choice.nll,
        kl={guide.latent: kl_divergence(plain.normal, prior.normal).item()},
        marginal_kl={
            name: kl_divergence(plain.marginal([name]).normal, prior.marginal([name]).normal).item()
            for name in plain.shapes
        },
        scales={k: (after[k] / before[k]).log().mean().exp().item() for k in after},
        expected_nll=_expected_nll(model, guide, plain.normal.covariance, rows),
        candidates=candidates,
    )


def _expected_nll(
    model: Model, guide: LaplaceGuide, covariance: Covariance, rows: Jacobians
) -> float:
    nlls, likelihood = [], model.likelihood
    for batch, outputs, jacobians in rows:
        assert batch.labels is not None
        if likelihood.noise_site:  # these are from before it was chosen
            mean = outputs.mean.clone()
            mean[:, outputs.of_noise] = likelihood.log_noise(guide.means())
            outputs = replace(outputs, mean=mean)
        noise = symmetric_noise(DRAWS, outputs.mean.shape[1]).to(outputs.mean)
        values = outputs.draws(covariance.projected(jacobians), noise)
        nlls.append(-outputs.labels(values).log_prob(batch.labels).mean(0))
    return torch.cat(nlls).mean().item()


def _sampled(examples: Examples, seed: int) -> tuple[Examples, list[Examples]]:
    """Random examples for the prior's scales and the expected NLL; with the others, if there are
    more, for the curvature."""
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
    first, *more = (examples.subset(part) for part in order[:_EXAMPLES].split(_SCALED))
    return first, more


def _jacobians(
    model: Model, guide: LaplaceGuide, examples: Examples, share: float = 1.0
) -> Jacobians:
    """As many examples at a time as there is memory for; several processes divide the batches."""
    means = guide.unpack(guide.loc.detach())  # as they were trained
    at_once = examples_at_once(len(guide.loc), _outputs(model, examples))

    def batches() -> Iterator[Batch]:
        parts = -(-len(examples) // at_once)
        every = CachedBatches(model, examples).prediction(at_once)
        for _, batch in tracked(every, "", parts, share):
            yield batch.to(model.network.device)

    def compute(batch: Batch) -> list[Tensor]:
        outputs, rows = jacobian(model, means, batch)
        return [torch.tensor(outputs.shape), outputs.mean, rows]

    for batch, (shape, mean, rows) in map_over_ranks(batches(), compute):
        of_one = tuple(shape.tolist())
        yield batch, LinearOutputs(model, mean, of_one, batch.choices, batch.extra), rows


def _outputs(model: Model, examples: Examples) -> int:
    return model.network.outputs * examples.width


def _repeatable(model: Model, guide: LaplaceGuide, examples: Examples) -> Callable[[], Jacobians]:
    """`_jacobians` at every call, computed once if there is memory to keep them."""
    compute = partial(_jacobians, model, guide, examples)
    if len(examples) * _outputs(model, examples) > rows_kept(len(guide.loc)):
        return compute
    kept = [*compute()]
    return lambda: kept


@torch.no_grad()
def equal_effect(model: Model, guide: LaplaceGuide, rows: Jacobians) -> Tensor:
    """Prior sds under which every site of the network has the same effect on the outputs.

    The variance of a site's weights is 1 / (number of sites * sum of its squared Jacobian entries),
    the sum averaged over examples and over outputs (under a softmax over the contrasts between
    them, one less). So the prior sd of an output of the linearised network is 1. Gates, whose
    effect is that of what they multiply, and the likelihood's own sites keep their scales.

    Returns:
        (D,) sds.
    """
    own = {site.name for site in model.likelihood.sites}
    own |= {site.name for site in model.sites if site.role == "gate"}
    total = torch.zeros_like(guide.loc)
    count = 0
    for batch, outputs, jacobians in rows:
        inside = jacobians[:, : math.prod(outputs.shape)]
        total += inside.square().sum((0, 1))
        there = inside.shape[:2].numel() if batch.choices is None else int(batch.choices.sum())
        count += there - len(inside) * model.likelihood.softmax
    effects = {name: part.sum().item() for name, part in guide.unpack(total / count).items()}
    effects = {name: effect for name, effect in effects.items() if name not in own and effect > 0}
    scales = [
        torch.full_like(scale, (len(effects) * effects[name]) ** -0.5) if name in effects else scale
        for name, scale in guide.unpack(guide.first_scale).items()
    ]
    return torch.cat([scale.flatten() for scale in scales])


def covariance(guide: LaplaceGuide, curvature: Curvature, tau: float) -> Covariance:
    """The inverse of tau P + N F: the leading directions, and the diagonal of the rest.

    If the prior is an earlier posterior with precision Q, the inverse of tau P + (Q - P) + N F.
    """
    prior = guide.prior.covariance
    with exact(prior.scale):
        root, rest = curvature.root, _diagonal(guide, tau) + curvature.rest
        if prior.rank:  # the directions of an earlier posterior
            both = torch.cat([root, prior.scale.unsqueeze(-1) * prior.precision_root()], 1)
            gathered = Gathered(rest, guide.rank, both.shape[1])
            gathered.add(both.mT)
            root, left = gathered.parts()
            rest = rest + left
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
    """The densities of held-out rows at every tau."""
    taus = TAUS if given is None else torch.tensor([given], dtype=torch.float64)
    shown = held_out
    if len(held_out) > _HELD_OUT:
        order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))
        shown = held_out.subset(order[:_HELD_OUT])
    prior = guide.prior.covariance
    root = torch.cat([curvature.root, prior.scale.unsqueeze(-1) * prior.precision_root()], 1)
    # The inverse of d + R R' by Woodbury's identity: a small matrix for each tau.
    inverses = torch.stack([1 / (_diagonal(guide, tau) + curvature.rest) for tau in taus.tolist()])
    ones = torch.eye(root.shape[1]).to(root)
    inner = [
        torch.linalg.inv((ones + root.mT @ (root * inverse.unsqueeze(-1))).double())
        for inverse in inverses
    ]
    spreads: list[list[Tensor]] = [[] for _ in inner]
    held: list[tuple[LinearOutputs, Tensor]] = []
    for batch, outputs, jacobians in _jacobians(model, guide, shown):
        assert batch.labels is not None
        rows = jacobians * prior.scale
        held.append((outputs, batch.labels))
        products = [(rows * row.unsqueeze(1)) @ inverses.mT for row in rows.unbind(1)]
        grams = torch.stack(products, 1).double().unbind(-1)  # for each tau (B, E, E)
        for number, (inverse, gram) in enumerate(zip(inverses, grams, strict=True)):
            along = (rows @ (root * inverse.unsqueeze(-1))).double()
            spreads[number].append(gram - along @ inner[number] @ along.mT)
    # A tau that is given is for the trained noise, and earlier rounds had noise of their own.
    free = model.likelihood.noise_site is not None and given is None and not guide.informed
    if model.likelihood.constant_noise:
        return with_constant_noise(taus, spreads, held, model.likelihood.unit, free)
    if free:
        return with_noise_by_text(taus, spreads, held)
    return of_draws(taus, spreads, held, scaled=model.likelihood.softmax and given is None)
