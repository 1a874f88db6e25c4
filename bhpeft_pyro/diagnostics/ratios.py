"""Log importance ratios of the posterior to a guide."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta, MaskedDistribution, TorchDistribution
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Independent, biject_to

from ..base.progress import work
from ..base.threads import alone
from ..errors import GuideError
from ..guides import Guide
from ..model.cached_batches import CachedBatches
from ..model.model import Model
from ..prediction.draws import PLATE, Draws, linearised_at, traces
from ..prediction.passes import passes
from ..priors import checked, complete


def log_likelihoods(
    model: Model, draws: Iterable[Draws], feed: CachedBatches, samples: int | None = None
) -> Tensor:
    """(S,) float64: log p(labels | weights) of all examples together, under each of S draws."""

    def take(predicted: TorchDistribution, labels: Tensor | None) -> tuple[Tensor]:
        assert labels is not None
        return (predicted.log_prob(labels),)

    found = []
    with work("likelihoods", samples) as whole:
        for (part,) in passes(model, draws, feed, take):
            found.append(part.double().sum(-1))
            whole.next(parts=len(part))
    return torch.cat(found)


def log_ratios(
    model: Model,
    guide: Guide,
    feed: CachedBatches,
    samples: int,
    seed: int = 0,
    temperature: float = 1.0,
) -> Tensor:
    """(S,) float64: log p(labels | w) / T + log p(w) - log q(w) of S draws w of the guide; T is the
    temperature at which it was fitted.

    The likelihood is that of all examples; for a linear guide, that of the linearised network.
    A guide may sample auxiliary variables of which its latents are one-to-one functions, each
    given as a `Delta` with the log-Jacobian as its `log_density`, as Pyro's autoguides do.

    Raises:
        GuideError: latents and guide differ; the guide is a point in some of them; or it samples
            more or fewer numbers than the latents have, so that its density is not known.
    """
    at, densities = linearised_at(model, guide), []

    def draws() -> Iterator[Draws]:
        for trace in traces(guide, samples, torch.Generator().manual_seed(seed)):
            weights = {
                name: node["value"].detach()
                for name, node in _sites(trace).items()
                if not (node["is_observed"] or node["infer"].get("is_auxiliary"))
            }
            count = len(next(iter(weights.values())))
            with alone(), poutine.trace() as tracer, pyro.plate(PLATE, count, dim=-2):
                poutine.condition(checked, data=weights)(model.prior, model.sites)
            _check(_sites(trace), _sites(tracer.trace))
            densities.append(_log_prob(tracer.trace, weights, temperature) - _log_prob(trace))
            yield Draws(complete(model.prior, model.sites, weights), at)

    likelihood = log_likelihoods(model, draws(), feed, samples)
    ratios = likelihood / temperature + torch.cat(densities)
    if ratios.isnan().any() or (ratios == math.inf).any():
        raise GuideError("guide: its log-density, or the model's, is not finite at its own draws")
    return ratios


def _sites(trace: poutine.Trace) -> dict[str, dict[str, Any]]:
    nodes: dict[str, Any] = dict(trace.nodes)
    return {
        name: node
        for name, node in nodes.items()
        if node["type"] == "sample" and not site_is_subsample(node)
    }


def _log_prob(
    trace: poutine.Trace, latents: Collection[str] | None = None, temperature: float = 1.0
) -> Tensor:
    """(s,) float64: the log-probability of each draw; what is not among the `latents`, such as a
    prior's factor, is tempered as labels are."""
    with torch.no_grad():
        trace.compute_log_prob(lambda _name, node: not site_is_subsample(node))
    total = torch.zeros((), dtype=torch.float64)
    for name, node in _sites(trace).items():
        # Dims but the draws' are those of plates in the guide or prior.
        log_prob = node["log_prob"].double().movedim(-2, 0).flatten(1).sum(1).cpu()
        total = total + log_prob / (1.0 if latents is None or name in latents else temperature)
    return total


def _check(guided: Mapping[str, dict[str, Any]], latent: Mapping[str, dict[str, Any]]) -> None:
    """Check that q(w) is a density over the model's latents, and that the trace gives it."""
    if missing := [name for name, node in latent.items() if not node["is_observed"]]:
        raise GuideError(f"guide: it does not sample {', '.join(missing)}")
    own = {name for name, node in guided.items() if not node["infer"].get("is_auxiliary")}
    if unknown := own - latent.keys():
        raise GuideError(
            f"guide: the model has no {', '.join(sorted(unknown))}; mark auxiliary sites with "
            "infer={'is_auxiliary': True}"
        )
    # What a prior computes (`pyro.deterministic`) or adds (`pyro.factor`) is not a latent.
    wanted = sum(_dimensions(latent[name]) for name in own)
    given = sum(_dimensions(node) for node in guided.values() if not _is_point(node["fn"]))
    if given != wanted:
        points = ", ".join(name for name in own if _is_point(guided[name]["fn"])) or "none"
        raise GuideError(
            f"guide: it draws {given} random numbers for latents of {wanted} dimensions (fixed or "
            f"computed: {points}), so it has no density over them"
        )


def _dimensions(node: Mapping[str, Any]) -> int:
    """How many unconstrained numbers a site has, per draw."""
    fn = node["fn"]
    batch = math.prod(fn.batch_shape) // fn.batch_shape[-2]
    return batch * math.prod(biject_to(fn.support).inverse_shape(fn.event_shape))


def _is_point(fn: Any) -> bool:
    while isinstance(fn, Independent | MaskedDistribution):
        fn = fn.base_dist
    return isinstance(fn, Delta)
