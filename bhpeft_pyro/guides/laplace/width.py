"""The covariance of a Laplace approximation, once its mean is trained, and the choice of its width.

tau, and the noise scale of ratings or the output scale of a softmax, maximise the log density of
held-out rows; training rows will not do, since a network may have memorised them. The mean does not
depend on tau.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...base.distributions import Covariance, LowRankNormal
from ...base.fit_options import FitOptions
from ...base.isolation import seeded
from ...base.progress import work
from ...data import Examples
from ...data.batch import random_order
from ...model.model import Model
from ..earlier import Earlier
from .choice_of_tau import Choice, Width, best_together
from .curvature import Information, Jacobians, equal_effect, jacobians, repeatable
from .held_out_densities import candidates_of

if TYPE_CHECKING:
    from .laplace_guide import LaplaceGuide

_EXAMPLES = 64  # at most, for the curvature
_SCALED = 32  # at most, for the prior's scales and the expected NLL: the first of those above


def compute_width(
    guide: LaplaceGuide,
    model: Model,
    examples: Examples,
    held_out: Examples | None,
    options: FitOptions,
    earlier: Earlier | None = None,
    last_noise: Tensor | None = None,
) -> tuple[Model, Width]:
    """Compute the covariance of a trained guide, in place: its method, see `Guide.compute_width`.

    Without held-out rows tau is that of the options or changes with the noise scale of ratings
    only (it is 1 at first), and the output scale is that of `earlier`.
    """
    likelihood, pooled = model.likelihood, 1.0
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
        prior = guide.information_before(model)
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


def choose_together(
    guides: Sequence[Any], widths: Sequence[Width]
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
        guide.retune(choice.tau, times, choice.output_scale)
        said = {**width.reported, "tau": choice.tau, "component_nll": choice.nll}
        if said["noise"] is not None:
            said["noise"] *= times
        if said["output_scale"] is not None:
            said["output_scale"] = choice.output_scale
        reports.append(said)
    return reports, {"point_nll": point_nll, "component_nll": nll}


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
