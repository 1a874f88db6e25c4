"""Log importance ratios of the posterior to a guide.

What weight draws predict, and how probable they make the labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta, MaskedDistribution, TorchDistribution
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Independent, biject_to

from ..errors import GuideError
from ..inference.draws import PLATE, alone, traces
from ..inference.passes import Block, Feed, centre, passes
from ..model.model import Model
from ..priors import complete

__all__ = [
    "Outcome",
    "labels",
    "log_ratios",
    "run",
]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What S draws say of N examples, in float64.

    Attributes:
        predictions: (S, N, K) class probabilities, or (S, N, 1) means of ratings.
        log_likelihood: (S,) log p(labels | weights) of the whole data set; None without labels.
    """

    predictions: Tensor
    log_likelihood: Tensor | None


def run(model: Model, draws: Iterable[Block], feed: Feed) -> Outcome:
    """Predict every example of a feed under each of the draws."""
    rating = model.likelihood.kind == "rating"

    def take(distribution: TorchDistribution, known: Tensor | None) -> Sequence[Tensor]:
        values = distribution.mean.unsqueeze(-1) if rating else distribution.probs
        return (values,) if known is None else (values, distribution.log_prob(known))

    parts = passes(model, draws, feed, take)
    predictions, *log_prob = (torch.cat(part).double() for part in zip(*parts, strict=True))
    return Outcome(predictions, log_prob[0].sum(-1) if log_prob else None)


def labels(model: Model, draws: Iterable[Block], feed: Feed) -> Tensor:
    """(S, N) labels: one set drawn from the likelihood under each of the draws."""
    kind = torch.float32 if model.likelihood.kind == "rating" else torch.int64
    parts = passes(model, draws, feed, lambda distribution, _: (distribution.sample().to(kind),))
    return torch.cat([part for (part,) in parts])


def log_ratios(
    model: Model,
    guide: Callable[..., Any],
    feed: Feed,
    samples: int,
    seed: int = 0,
    temperature: float = 1.0,
) -> Tensor:
    """(S,) float64: log p(labels | w) / T + log p(w) - log q(w) of S draws w of the guide.

    The likelihood is that of all examples, and for a linear guide that of the linearised network.
    A guide may sample auxiliary variables of which its latents are one-to-one functions, given as a
    `Delta` each with the log-Jacobian as their `log_density`: Pyro's autoguides do.

    Args:
        temperature: T of the posterior that the guide was fitted to.

    Raises:
        GuideError: latents and guide differ; the guide is a point in some of them; or it samples
            more or fewer numbers than the latents are, so that its density at them is not known.
    """
    at, densities = centre(model, guide), []

    def draws() -> Iterator[Block]:
        for trace in traces(guide, samples, torch.Generator().manual_seed(seed)):
            weights = _latents(trace)
            prior = _prior(model, weights)
            _check(trace, prior)
            densities.append(_log_prob(prior) - _log_prob(trace))
            yield Block(complete(model.prior, model.sites, weights), at)

    likelihood = run(model, draws(), feed).log_likelihood
    assert likelihood is not None
    found = likelihood / temperature + torch.cat(densities)
    if found.isnan().any() or (found == math.inf).any():
        raise GuideError("guide: its log-density, or the model's, is not finite at its own draws")
    return found


def _latents(trace: poutine.Trace) -> dict[str, Tensor]:
    return {
        name: node["value"].detach()
        for name, node in _sites(trace)
        if not (node["is_observed"] or node["infer"].get("is_auxiliary"))
    }


def _prior(model: Model, weights: Mapping[str, Tensor]) -> poutine.Trace:
    draws = len(next(iter(weights.values())))
    conditioned = poutine.condition(model.prior, data=dict(weights))
    with alone(), poutine.trace() as tracer, pyro.plate(PLATE, draws, dim=-2):
        conditioned(model.sites)
    return tracer.trace


def _sites(trace: poutine.Trace) -> Iterator[tuple[str, dict[str, Any]]]:
    nodes: dict[str, Any] = dict(trace.nodes)
    for name, node in nodes.items():
        if node["type"] == "sample" and not site_is_subsample(node):
            yield name, node


def _log_prob(trace: poutine.Trace) -> Tensor:
    """(s,) float64: the log-probability of each draw."""
    total = torch.zeros((), dtype=torch.float64)
    try:
        with torch.no_grad():
            trace.compute_log_prob(lambda _name, node: not site_is_subsample(node))
    except ValueError as error:  # as Pyro wraps up ours
        raise error.__cause__ if isinstance(error.__cause__, GuideError) else error from None
    for _, node in _sites(trace):
        # Dims but the draws' are those of plates in the guide or prior itself.
        total = total + node["log_prob"].double().movedim(-2, 0).flatten(1).sum(1).cpu()
    return total


def _check(trace: poutine.Trace, prior: poutine.Trace) -> None:
    """See that q(w) is a density over the model's latents, and that the trace gives it."""
    guided, latent = dict(_sites(trace)), dict(_sites(prior))
    if missing := [name for name, node in latent.items() if not node["is_observed"]]:
        raise GuideError(f"guide: it does not sample {', '.join(missing)}")
    own = {name for name, node in guided.items() if not node["infer"].get("is_auxiliary")}
    if unknown := own - latent.keys():
        raise GuideError(
            f"guide: the model has no {', '.join(sorted(unknown))}; mark auxiliary sites with "
            "infer={'is_auxiliary': True}"
        )
    # What a prior computes (`pyro.deterministic`) or adds (`pyro.factor`) is no latent.
    wanted = sum(_degrees(latent[name]) for name in own)
    given = sum(_degrees(node) for node in guided.values() if not _is_point(node["fn"]))
    if given != wanted:
        points = ", ".join(name for name in own if _is_point(guided[name]["fn"])) or "none"
        raise GuideError(
            f"guide: it draws {given} random numbers for latents of {wanted} dimensions (held at "
            f"a point or computed: {points}), so it has no density over them"
        )


def _degrees(node: Mapping[str, Any]) -> int:
    """How many unconstrained numbers a site is, per draw."""
    fn = node["fn"]
    own = math.prod(fn.batch_shape) // fn.batch_shape[-2]
    return own * math.prod(biject_to(fn.support).inverse_shape(fn.event_shape))


def _is_point(fn: Any) -> bool:
    while isinstance(fn, Independent | MaskedDistribution):
        fn = fn.base_dist
    return isinstance(fn, Delta)
