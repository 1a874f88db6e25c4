"""How far a round moved the weights from its prior, by PEFT kind and layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from .distributions import base_of
from .errors import GuideError, PriorError
from .guides import Guide, LaplaceGuide, latents
from .mixture import MixturePosterior
from .posterior import Posterior
from .priors import unpack

__all__ = ["Shift", "shifts"]


@dataclass(frozen=True)
class Shift:
    """From prior to posterior, of some weights.

    Attributes:
        moved: root mean square of (posterior mean - prior mean) / prior sd. Draws of the prior
            itself have 1.
        narrowed: geometric mean of posterior sd / prior sd; 0 for points.
        kl: sum of the KLs of the weights' marginals, in nats: the KL where weights are independent.
            It leaves out what a joint guide knows of their correlations, and is infinite for
            points.
    """

    moved: float
    narrowed: float
    kl: float


def shifts(posterior: Posterior) -> dict[str, dict[int | None, Shift]]:
    """What the last round's data did to the weights: the shift from its prior, layer by layer.

    The prior of a first round is the model's; of an update, the posterior of the round before. So
    layers that new data did not need are near 0 prior sds and at a ratio of 1, which a comparison
    of the weights themselves would not show.

    Args:
        posterior: of one of this package's guides, under independent Normals or an earlier
            posterior; of a mixture the mean over its components, each from its own prior.

    Returns:
        Kind ("lora", "adapter", "prefix", "head", ...) to layer number, None for what has no
        layer, to the shift.

    Raises:
        GuideError: the guide does not tell its means and sds.
        PriorError: a prior that is not Normal, or has scales of its own.

    >>> from bhpeft_pyro import fit
    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> fitted = fit(tiny_model(), "normal", tiny_examples(), max_steps=2, progress=False)
    >>> {kind: list(layers) for kind, layers in shifts(fitted).items()}
    {'lora': [0, 1], 'head': [None]}
    """
    components = posterior.components if isinstance(posterior, MixturePosterior) else (posterior,)
    parts: dict[tuple[str, int | None], list[tuple[Tensor, ...]]] = {}
    for each in components:
        _collect(each, parts)
    found: dict[str, dict[int | None, Shift]] = {}
    for (kind, number), tensors in sorted(parts.items(), key=lambda item: item[0][1] or 0):
        columns = [torch.cat([t.flatten() for t in group]) for group in zip(*tensors, strict=True)]
        found.setdefault(kind, {})[number] = _shift(columns, len(components))
    return found


def _collect(
    posterior: Posterior, parts: dict[tuple[str, int | None], list[tuple[Tensor, ...]]]
) -> None:
    """Add the prior's means and sds and the posterior's to each kind's and layer's."""
    guide = posterior.guide
    if not isinstance(guide, Guide):
        raise GuideError(
            f"shifts: {type(guide).__name__} does not tell its means and sds; expected one of "
            "bhpeft_pyro.guides"
        )
    before = _prior(posterior)
    means, sds = guide.means(), guide.scales()
    if isinstance(guide, LaplaceGuide) and guide.measured:  # as it goes into the next round
        sds = guide.unpack(guide.as_prior().normal.stddev)
    for site in posterior.model.sites:
        mean = means[site.name]
        sd = sds.get(site.name, torch.zeros_like(mean))
        tensors = tuple(t.detach().double().cpu() for t in (*before[site.name], mean, sd))
        kind = site.name.split(".")[0]
        if not site.layers:
            parts.setdefault((kind, None), []).append(tensors)
        for i, layer in enumerate(site.layers):
            parts.setdefault((kind, layer), []).append(tuple(t[i] for t in tensors))


def _shift(columns: Sequence[Tensor], components: int) -> Shift:
    loc0, sd0, loc, sd = columns
    moved = ((loc - loc0) / sd0).square().mean().sqrt()
    ratio = (sd / sd0).log().mean().exp()
    kl = torch.inf
    if (sd > 0).all():
        kl = kl_divergence(Normal(loc, sd), Normal(loc0, sd0)).sum().item() / components
    return Shift(moved.item(), ratio.item(), kl)


def _prior(posterior: Posterior) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and marginal sd by site, each of the site's shape."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for latent in latents(posterior.model):
        if latent.sites:  # a joint one, of an earlier posterior
            loc, sd = (
                unpack(flat, latent.sites) for flat in (latent.prior.mean, latent.prior.stddev)
            )
            found |= {name: (loc[name], sd[name]) for name in latent.sites}
        elif not latent.is_site:
            raise PriorError(
                f"shifts: the prior also samples {latent.name!r}, on which its sites may depend; "
                "expected independent Normals or an earlier posterior of such"
            )
        elif not isinstance(base_of(latent.prior), Normal):
            raise PriorError(
                f"shifts: {latent.name!r} is {type(base_of(latent.prior)).__name__} under the "
                "prior; expected Normal"
            )
        else:
            found[latent.name] = latent.prior.mean, latent.prior.stddev
    return found
