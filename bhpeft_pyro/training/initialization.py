"""Initial values of guides, and the coordinates of the PEFT weights.

A Normal guide starts at a fitted head, with the sds of a diagonal Laplace approximation. Natural
gradient steps are scaled by the sds; with those of the prior, which are far too wide for the data,
the first steps diverge.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice

import pyro
import torch
from torch import Tensor
from torch.distributions import biject_to

from ..base.checks import warn
from ..base.fit_options import FitOptions
from ..base.isolation import own_parameters, seeded
from ..data import Examples
from ..data.batch import Batch
from ..errors import GuideError
from ..guides import Guide, latents
from ..guides.latent import with_mean
from ..model.cached_batches import CachedBatches
from ..model.fisher import diagonal, from_prior, scores
from ..model.model import Model
from ..priors import complete, unpack
from .loop import Setup, optimise
from .report import FitReport

# Size of the output side, in units, while the input side is measured: at zero it has no effect.
_SMALL = 0.1
_EXAMPLES = 128  # for the Fisher information
# Steps of the head alone are cheap, and batches may be large: at least a tenth of the examples.
_STEPS, _SHARE = 90, 10

Values = Callable[[int], Mapping[str, Tensor]]
"""From a number of examples to a value of each site for each example."""


def align(model: Model, batches: Sequence[Batch], heads: Guide | None = None) -> None:
    """Choose the coordinates of the PEFT sites, unless an earlier round has chosen them.

    They come from the Fisher information of the frozen transformer on these texts, with another
    head for each example. No labels are used here. Heads, and the likelihood's own weights, are
    drawn from the guide `heads`. After it was fitted to frozen features, the coordinates are
    directions that matter for these labels. Without it, heads are random, with outputs of sd 1.
    """
    coordinates = model.network.coordinates
    if wide := coordinates.wide:
        warn(
            f"backbone: {', '.join(wide)} are wider than {coordinates.widest:,} and keep their own "
            "coordinates, in which weights are more correlated than a mean-field guide can be"
        )
    if coordinates.fitted or not coordinates.outer:
        return
    inner, outer = coordinates.inner, coordinates.outer
    peft = {site.name for site in coordinates.sites}

    def drawn_values(count: int, size: float) -> dict[str, Tensor]:
        """A value of each site for each example; the output side has `size`, in units."""
        drawn = {} if heads is None else _drawn(model, heads, count)
        values = {}
        for site in model.sites:
            noise = site.unit * torch.randn(count, 1, *site.shape, device=site.unit.device)
            if site.name in outer:
                values[site.name] = size * noise
            elif site.name in drawn and site.name not in peft:
                values[site.name] = drawn[site.name]
            elif site.role == "head":
                values[site.name] = noise
            else:
                values[site.name] = torch.stack([site.init() for _ in range(count)]).unsqueeze(1)
        return values

    coordinates.fit_anchors(_leading(model, batches, inner, lambda n: drawn_values(n, _SMALL)))
    coordinates.fit_axes(*_moments(model, batches, outer, lambda n: drawn_values(n, 0.0)))


@torch.no_grad()
def _drawn(model: Model, guide: Guide, count: int) -> dict[str, Tensor]:
    """`count` draws of each site, `(count, 1, *shape)`."""
    with pyro.plate("draws", count, dim=-2):
        return complete(model.prior, model.sites, guide())


def _gradients(
    model: Model, batches: Sequence[Batch], values: Values
) -> Iterator[dict[str, Tensor]]:
    """Per-example gradients of every site, batch by batch."""
    for batch in batches:
        yield from scores(model, values(len(batch)), batch.to(model.network.device))


def _moments(
    model: Model, batches: Sequence[Batch], names: Sequence[str], values: Values
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """E[G G'] and E[G' G] of the gradients G, (layer, a, b), per site."""
    lefts: dict[str, Tensor] = {}
    rights: dict[str, Tensor] = {}
    for gradients in _gradients(model, batches, values):
        for sums, pattern in ((lefts, "nlab,nlcb->lac"), (rights, "nlab,nlac->lbc")):
            for name in names:
                product = torch.einsum(pattern, gradients[name], gradients[name])
                sums[name] = sums.get(name, 0) + product
    count = sum(map(len, batches))
    left, right = ({k: total / count for k, total in sums.items()} for sums in (lefts, rights))
    return left, right


def _leading(
    model: Model, batches: Sequence[Batch], names: Sequence[str], values: Values
) -> dict[str, tuple[Tensor, Tensor]]:
    """The a largest eigenvalues of E[G' G] and their eigenvectors, with G, (layer, a, b), the
    gradients of each site.

    If b is large the gradients themselves are kept: a (b, b) matrix per layer would take more
    memory, and its eigenvectors minutes.
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
    leading = {}
    for name, parts in rows.items():
        layers = [_eigen(layer, ranks[name]) for layer in torch.cat(parts, 1)]
        strengths, vectors = zip(*layers, strict=True)
        leading[name] = torch.stack(strengths) / count, torch.stack(vectors)
    return leading


def _eigen(rows: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues and eigenvectors of a symmetric (b, b) matrix, or of G' G for fewer
    rows G, (m, b)."""
    rows = rows.double()
    if len(rows) == rows.shape[1]:
        strength, vectors = torch.linalg.eigh(rows)
        return strength[-rank:], vectors[:, -rank:]
    strength, mix = torch.linalg.eigh(rows @ rows.mT)
    # The largest first: QR would otherwise make it orthogonal to rounding errors.
    vectors = torch.linalg.qr((rows.mT @ mix[:, -rank:]).flip(1))[0]
    return strength[-rank:], vectors.flip(1)


def start(
    model: Model, guide: Guide, examples: Examples, options: FitOptions, texts: Sequence[Batch]
) -> None:
    """Initialise a guide with free sds, in place.

    First the sds of hierarchical scales are narrowed by the information that the weights have about
    them. Then the head is fitted to the frozen transformer's features, which are computed once.
    Then, with this head, the coordinates of the PEFT weights are chosen, on `texts`, and their sds
    set.
    """
    done: set[str] = set()
    with own_parameters():
        guide.narrow(from_prior(model, guide.means()))
        if model.network.kinds:
            frozen = CachedBatches(model, examples, frozen=True)
            done = _narrow(model, guide, frozen, options, done)
            _fit_head(model, guide, frozen, options)
            align(model, texts, guide)
            guide.set_prior(model)
        else:
            align(model, texts)
        _narrow(model, guide, CachedBatches(model, examples), options, done)


def own_start(model: Model, seed: int) -> dict[str, Tensor]:
    """Random initial values for a point estimate, on the input side of every PEFT branch.

    LoRA's A, an adapter's down-projections and a prefix's keys are random projections; others lead
    to another mode. The output side starts at zero, which leaves the transformer unchanged. Where
    the prior has a mean other than zero, a site starts there.
    """
    coordinates = model.network.coordinates
    given = with_mean(model)
    with seeded(seed):
        drawn = {site.name: coordinates.another(site.name) for site in model.network.sites}
    return {k: away for k, away in drawn.items() if away is not None and k not in given}


def moved(model: Model, guide: Guide, names: Collection[str]) -> bool:
    """Whether any of some sites is not at its initial value any more."""
    initial: dict[str, Tensor] = {}
    for latent in latents(model):
        value = biject_to(latent.support)(latent.loc)
        initial |= unpack(value, latent.sites) if latent.sites else {latent.name: value}
    means = guide.means()
    return any(not torch.allclose(means[k], initial[k]) for k in initial.keys() & {*names})


def narrowed(model: Model, guide: Guide) -> bool:
    """Whether an earlier fit has set a guide's sds, and with them its means."""
    sds, means = guide.scales(), guide.means()
    same = (torch.allclose(sds[x.name], x.scale) for x in latents(model) if x.name in sds)
    return moved(model, guide, means) and not (sds and all(same))


def centred(model: Model, guide: Guide) -> Model:
    """The model with its prior centred at a guide's present values of the input side, if it
    `centres_prior`.

    `fit` centres it at their random initial values. Where these are not known, what was trained
    takes their place, since the projections are arbitrary anyway.
    """
    if not guide.centres_prior:
        return model
    inner = {site.name for site in model.sites if site.role == "input"} - with_mean(model)
    prior = guide.centre_prior({k: mean for k, mean in guide.means().items() if k in inner})
    return model if prior is None else model.with_prior(prior)


def scatter(model: Model, guide: Guide) -> None:
    """Move a guide's initial means by a draw of the prior.

    What is not at its initial value any more stays: a head that `start` has fitted, and the weights
    of an earlier fit. If a model is linear in its weights and labels have no noise, the point
    estimates that such initial values lead to without a penalty are distributed as the posterior
    (Matthews et al. 2017).
    """
    means: Mapping[str, Tensor] = {}
    with suppress(GuideError):  # a function, say, which has none and is not moved
        means = guide.means()
    moved = {}
    for latent in latents(model):
        away, to_support = latent.scale * torch.randn_like(latent.loc), biject_to(latent.support)
        mean, start = means.get(latent.name), to_support(latent.loc)
        if mean is None or torch.allclose(mean, start):
            moved[latent.name] = to_support(latent.loc + away)
    guide.move(moved)


def _fit_head(model: Model, guide: Guide, frozen: CachedBatches, options: FitOptions) -> None:
    size, particles = len(frozen.examples), options.particles
    batch_size = particles * -(-max(options.batch_size, size // _SHARE) // particles)
    brief = replace(
        options,
        max_steps=max(_STEPS, replace(options, max_steps=None).steps(-(-size // batch_size))),
        batch_size=batch_size,
        patience=None,
    )
    # Frozen features say nothing about PEFT weights: their prior alone would move them to its mode,
    # which for A = B = 0 is a saddle point of B A.
    kinds = {kind.name for kind in model.network.kinds}
    held = guide.parameters_of({n for n in guide.means() if n.split(".")[0] in kinds})
    for weights in held:
        weights.requires_grad_(False)
    try:
        temperature = brief.temperature or 1.0
        setup = Setup(model, guide, frozen, None, brief, temperature=temperature)
        optimise(setup, FitReport(size, "", brief))
    finally:
        for weights in held:
            weights.requires_grad_(True)


def _narrow(
    model: Model, guide: Guide, feed: CachedBatches, options: FitOptions, done: set[str]
) -> set[str]:
    """Add the Fisher information of N examples to the precisions of latents that are not `done`;
    return those that changed (with frozen features, no PEFT weights)."""
    generator = torch.Generator().manual_seed(options.seed)
    count = -(-_EXAMPLES // options.batch_size)
    device = model.network.device
    batches = [
        batch.to(device) for batch in islice(feed.training(options.batch_size, 1, generator), count)
    ]
    means = guide.means()
    information = diagonal(model, means, batches)
    # A scale has no effect while the weights that it multiplies are zero: then these are drawn.
    silent = {name for name, more in information.items() if not more.any()}
    if silent := silent - {site.name for site in model.sites}:
        with torch.no_grad():
            drawn = guide() | {name: means[name] for name in silent}
        more = diagonal(model, drawn, batches)
        information |= {name: more[name] for name in silent}
    size = len(feed.examples) / (options.temperature or 1.0)
    news = {
        name: size * more for name, more in information.items() if name not in done and more.any()
    }
    guide.narrow(news)
    return set(news)
