"""Where Normal guides start: at a fitted head, with the sds of a diagonal Laplace approximation.

Natural-gradient steps are scaled by the sds. At the prior's, which are far too wide for what the
data say, the first steps go astray, on ratings beyond return.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import TypeGuard

import torch
from torch import Tensor
from torch.distributions import biject_to

from ..batch import Batch
from ..data import Examples
from ..guides import BlockGuide, DeltaGuide, Guide, LowRankGuide, NormalGuide, latents
from ..guides.guide import key
from ..guides.latent import Latent
from ..head import Head
from ..model import Model
from .alignment import align
from .draws import seeded
from .feed import Feed
from .fisher import diagonal, from_prior
from .optimise import optimise
from .options import FitOptions
from .report import FitReport

__all__ = ["may_start", "own_start", "scatter", "start"]

_EXAMPLES = 128  # on which the Fisher information is measured
# For the head steps are cheap, and batches may be large: a tenth of the examples at least.
_STEPS, _SHARE = 90, 10
_NEAR = 0.1  # sds of the prior from the first start of a joint guide to the others


def may_start(guide: object, options: FitOptions) -> TypeGuard[Guide]:
    """Whether `start` applies: unless a width was asked for, or there is to be no posterior."""
    if not isinstance(guide, Guide) or options.temperature == 0:
        return False
    return any(
        (isinstance(block, LowRankGuide) and not block.point)
        or (isinstance(block, NormalGuide) and block.init_scale is None)
        for block in guide.blocks()
    )


def start(
    model: Model, guide: Guide, examples: Examples, options: FitOptions, texts: Sequence[Batch]
) -> None:
    """Move a guide to its start, in place.

    What weights tell about their scales comes first. Then the head is fitted to the frozen
    transformer's features, which are computed once; then the coordinates of the PEFT weights are
    chosen and their sds set, under this head.

    Args:
        texts: what the coordinates are measured on.
    """
    told: set[str] = set()
    if _has_normals(guide):
        guide.narrow(from_prior(model, guide.means()))
    if isinstance(model.network.head, Head) and model.network.kinds:
        frozen = Feed(model, examples, frozen=True)
        fitted = _stand_in(model, guide)
        told = _narrow(model, fitted, frozen, options, told)
        _fit_head(model, fitted, frozen, options)
        align(model, texts, fitted)
        guide.follow(model)
    else:
        align(model, texts)
    _narrow(model, guide, Feed(model, examples), options, told)


def own_start(model: Model, seed: int) -> dict[str, Tensor]:
    """A start of its own for a point: the input side of every branch drawn anew.

    LoRA's A, an adapter's down-projections and a prefix's keys are projections, and other ones lead
    to another mode. The output side starts at zero, so each starts at the frozen transformer.
    """
    coordinates = model.network.coordinates
    with seeded(seed):
        return {
            site.name: away
            for site in model.network.sites
            if (away := coordinates.another(site.name)) is not None
        }


def scatter(model: Model, guide: Guide, options: FitOptions) -> None:
    """Move a guide's means away from their start by draws of the prior's sds, or a tenth of them.

    A head that `start` has fitted stays. Where a model is linear in its weights, the points that
    such starts lead to without a penalty are spread as the posterior is (Matthews et al. 2017).
    Joint guides stay near: what a whole draw of so many weights costs, half a nat each, steps of a
    twentieth of an sd take long to win back.
    """
    fitted = model.network.kinds and may_start(guide, options)
    joint = {
        name
        for block in guide.blocks()
        if isinstance(block, LowRankGuide)
        for name in block.means()
    }

    def away(latent: Latent) -> Tensor:
        sds = _NEAR if joint.issuperset(latent.names) else 1.0
        return sds * latent.scale * torch.randn_like(latent.loc)

    guide.move(
        {
            latent.name: biject_to(latent.support)(latent.loc + away(latent))
            for latent in latents(model)
            if not (fitted and latent.name.startswith("head."))
        }
    )


def _has_normals(guide: Guide) -> bool:
    return any(isinstance(block, NormalGuide) for block in guide.blocks())


def _stand_in(model: Model, guide: Guide) -> Guide:
    """The guide; for a joint one, whose covariance is dear to measure, one of the head alone, with
    the PEFT weights at a point: what is wanted is the head that the coordinates of the PEFT
    weights are measured under."""
    if not isinstance(guide, LowRankGuide):
        return guide
    points = {f"{kind.name}.*": "delta" for kind in model.network.kinds}
    return BlockGuide(model, {**points, "*": ("lowrank", {"rank": guide.rank})})


@contextmanager
def _held(model: Model, guide: Guide) -> Iterator[None]:
    """PEFT weights stay. Frozen features say nothing of them, so their prior alone would move them:
    to its mode, where that is zero a saddle of BA."""
    kinds = {kind.name for kind in model.network.kinds}
    joint = [
        (block.loc, block.at(names), block.loc.detach().clone())
        for block in guide.blocks()
        if isinstance(block, LowRankGuide)
        and (names := {name for name in block.means() if name.split(".")[0] in kinds})
    ]
    held = [
        table[key(name)]
        for block in guide.blocks()
        if isinstance(block, (DeltaGuide, NormalGuide))
        for name in block.means()
        if name.split(".")[0] in kinds
        for table in (block.loc, *([block.log_scale] if isinstance(block, NormalGuide) else []))
    ]
    for weights in held:
        weights.requires_grad_(False)
    try:
        yield
    finally:
        for weights in held:
            weights.requires_grad_(True)
        with torch.no_grad():  # of one tensor for all sites the entries are put back
            for loc, there, before in joint:
                loc.copy_(torch.where(there, before, loc))


def _fit_head(model: Model, guide: Guide, frozen: Feed, options: FitOptions) -> None:
    size = len(frozen.examples)
    batch_size = options.particles * -(
        -max(options.batch_size, size // _SHARE) // options.particles
    )
    brief = replace(
        options,
        max_steps=max(_STEPS, options.epochs * -(-size // batch_size)),
        batch_size=batch_size,
        accumulate=1,
        patience=None,
        progress=False,
    )
    report = FitReport(size, frozen.examples.fingerprint, brief)
    with _held(model, guide):
        optimise(model, guide, frozen, None, report)


def _narrow(
    model: Model,
    guide: Guide,
    feed: Feed,
    options: FitOptions,
    told: set[str],
) -> set[str]:
    """Add what N examples tell about the latents to their precisions, but not to those `told`.

    The covariance of a low-rank guide, or block, is measured as it is fitted.

    Returns:
        Those told now: with frozen features the examples say nothing about PEFT weights.
    """
    if not _has_normals(guide):
        return told
    generator = torch.Generator().manual_seed(options.seed)
    count = -(-_EXAMPLES // options.batch_size)
    device = model.network.device
    batches = [
        batch.to(device) for batch in islice(feed.training(options.batch_size, 1, generator), count)
    ]
    means = guide.means()
    information = diagonal(model, means, batches)
    # A scale has no effect where the weights that it multiplies are zero: there, those are drawn.
    silent = {name for name, more in information.items() if not more.any()}
    if silent := silent - {site.name for site in model.sites}:
        with torch.no_grad():
            drawn = guide() | {name: means[name] for name in silent}
        more = diagonal(model, drawn, batches)
        information |= {name: more[name] for name in silent}
    size = len(feed.examples) / (options.temperature or 1.0)
    news = {
        name: size * more for name, more in information.items() if name not in told and more.any()
    }
    guide.narrow(news)
    return set(news)
