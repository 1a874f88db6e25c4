"""Where Normal guides start: at a fitted head, with the sds of a diagonal Laplace approximation.

Natural-gradient steps are scaled by the sds. At the prior's, which are far too wide for what the
data say, the first steps go astray, on ratings beyond return.

Fitting a network's coordinates: along which directions of its weights predictions change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import TypeGuard

import pyro
import torch
from torch import Tensor
from torch.distributions import biject_to

from ..data import Examples
from ..data.batch import Batch
from ..guides import BlockGuide, DeltaGuide, Guide, LowRankGuide, NormalGuide, latents
from ..guides.guide import key
from ..guides.latent import Latent
from ..model.head import Head
from ..model.model import Model
from ..priors import complete
from .curvature import diagonal, from_prior, scores
from .elbo import seeded
from .loop import optimise
from .options import FitOptions
from .passes import Feed
from .report import FitReport

__all__ = [
    "align",
    "may_start",
    "own_start",
    "scatter",
    "start",
]


# Size of the output side, in units, while the input side is looked at: at zero it has no effect.
_SMALL = 0.1


def align(model: Model, batches: Sequence[Batch], heads: Guide | None = None) -> None:
    """Choose the coordinates of the PEFT sites, unless an earlier round has.

    The Fisher information is that of the frozen transformer, each example under a head of its own.
    No label is looked at here.

    Args:
        heads: draws the heads, and the likelihood's own weights: once fitted to the frozen
            features it knows where outputs should go, so the directions are those that matter for
            these labels. Of few labels it knows little, and its heads are nearly the prior's.
            Without it heads are random, with outputs of sd 1.
    """
    coordinates = model.network.coordinates
    if coordinates.fitted or not coordinates.outer:
        return
    inner, outer = coordinates.inner, coordinates.outer

    peft = {site.name for site in coordinates.sites}

    def values(count: int, size: float) -> dict[str, Tensor]:
        """A value of each site for each example; `size` of the output side, in units."""
        drawn = {} if heads is None else _drawn(model, heads, count)
        found = {}
        for site in model.sites:
            noise = site.unit * torch.randn(count, 1, *site.shape, device=site.unit.device)
            if site.name in outer:
                found[site.name] = size * noise
            elif site.name in drawn and site.name not in peft:
                found[site.name] = drawn[site.name]
            elif site.role == "head":
                found[site.name] = noise
            else:
                found[site.name] = torch.stack([site.init() for _ in range(count)]).unsqueeze(1)
        return found

    coordinates.fit_anchors(_leading(model, batches, inner, lambda n: values(n, _SMALL)))
    coordinates.fit_axes(*_moments(model, batches, outer, lambda n: values(n, 0.0)))


@torch.no_grad()
def _drawn(model: Model, guide: Guide, count: int) -> dict[str, Tensor]:
    """For each site `count` draws, (count, 1, *shape)."""
    with pyro.plate("draws", count, dim=-2):
        return complete(model.prior, model.sites, guide())


Values = Callable[[int], Mapping[str, Tensor]]
"""From a number of examples to a value of each site for each of them."""


def _gradients(
    model: Model, batches: Sequence[Batch], values: Values
) -> Iterator[dict[str, Tensor]]:
    """For each batch the gradients of every site, example by example."""
    for batch in batches:
        yield from scores(model, values(len(batch)), batch.to(model.network.device))


def _moments(
    model: Model, batches: Sequence[Batch], names: Sequence[str], values: Values
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """E[G G'] and E[G' G] of the gradients G, (layer, a, b), of the sites `names`."""
    lefts: dict[str, Tensor] = {}
    rights: dict[str, Tensor] = {}
    for gradients in _gradients(model, batches, values):
        for name in names:
            left, right = (
                torch.einsum(pattern, gradients[name], gradients[name])
                for pattern in ("nlab,nlcb->lac", "nlab,nlac->lbc")
            )
            lefts[name] = lefts.get(name, 0) + left
            rights[name] = rights.get(name, 0) + right
    count = sum(map(len, batches))
    return (
        {name: total / count for name, total in lefts.items()},
        {name: total / count for name, total in rights.items()},
    )


def _leading(
    model: Model, batches: Sequence[Batch], names: Sequence[str], values: Values
) -> dict[str, tuple[Tensor, Tensor]]:
    """Of E[G' G], of the gradients G, (layer, a, b), the a largest eigenvalues, and eigenvectors.

    Where b is large, it is the few gradients that are kept: a matrix (b, b) of every layer would
    take more room, and its eigenvectors minutes.
    """
    count = sum(map(len, batches))
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    for gradients in _gradients(model, batches, values):
        for name in names:
            g = gradients[name]
            if count * g.shape[2] < g.shape[3]:
                rows[name].append(g.transpose(0, 1).flatten(1, 2))
            else:
                total = torch.einsum("nlab,nlac->lbc", g, g)
                rows[name] = [sum(rows[name], total)]
    ranks = {site.name: min(site.shape[1:]) for site in model.sites if site.name in rows}
    found = {}
    for name, parts in rows.items():
        layers = [_eigen(each, ranks[name]) for each in torch.cat(parts, 1)]
        strengths, vectors = zip(*layers, strict=True)
        found[name] = torch.stack(strengths) / count, torch.stack(vectors)
    return found


def _eigen(rows: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues and eigenvectors of a symmetric (b, b), or of the product G' G of
    fewer rows G, (m, b)."""
    rows = rows.double()
    if len(rows) == rows.shape[1]:
        strength, vectors = torch.linalg.eigh(rows)
        return strength[-rank:], vectors[:, -rank:]
    strength, mix = torch.linalg.eigh(rows @ rows.mT)
    # The largest first, which would else be made orthogonal to rounding errors.
    vectors = torch.linalg.qr((rows.mT @ mix[:, -rank:]).flip(1))[0]
    return strength[-rank:], vectors.flip(1)


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
