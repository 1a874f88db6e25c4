"""How much the weights do in each layer, and how far a round moved them.

`changes` measures how much each PEFT branch changes the frozen transformer, `shifts` how far a
round moved the weights from its prior.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, matmul
from torch.distributions import Normal, kl_divergence

from ..base.distributions import base_of
from ..base.values import Amount, Seed, checked_call
from ..errors import GuideError
from ..guides import latents
from ..guides.guide import prior_of
from ..model.model import Model
from ..model.network import RandomPEFT
from ..peft.sites import Role, Site
from ..posterior.posterior import Posterior
from ..prediction.draws import Draws, draw_parts
from ..priors import unpack
from ..priors.any_prior import earlier_posterior, independent_normals

__all__ = ["Shift", "changes", "head_norms", "shifts", "sizes"]

ByLayer = dict[str, dict[int, Tensor]]
"""Branch ("lora.query", "adapter", "prefix.key", ...) to layer number to values (S, ...)."""

# What ready priors sample besides a site, by the end of its name, and over how many of its dims.
_LATENTS = {"log_layers": 1, "standard": None}

_DRAWS = 64

# The entry of the configuration with the number of attention heads that make a branch's output.
_HEADS = {
    "lora.query": "num_attention_heads",
    "lora.key": "num_key_value_heads",
    "lora.value": "num_key_value_heads",
}


@checked_call
def changes(posterior: Posterior, samples: Amount | None = None, seed: Seed = 0) -> ByLayer:
    """The `sizes` of branches under draws of the posterior: branch to layer number to (samples,).

    For a mixture `samples` is rounded up to equally many draws of each component, in their order.
    With `samples=0` they are those at the central weights of each component, (components,). None
    means 0 for linearised posteriors ("laplace") and 64 for others: in directions about which the
    data say nothing, draws are as wide as the prior, which may change a layer many times over.

    Draws of a linearised posterior are sized as its network uses them (`factors`).

    >>> from bhpeft_pyro import fit
    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> fitted = fit(tiny_model(), "normal", tiny_examples(), max_steps=2, progress=False)
    >>> {branch: list(layers) for branch, layers in changes(fitted).items()}
    {'lora.query': [0, 1], 'lora.value': [0, 1]}
    """
    if samples is None:
        samples = 0 if posterior.linear else _DRAWS
    network = posterior.model.network
    drawn = draw_parts(posterior.model, posterior.guides, samples, seed)
    parts = [sizes(network, factors(network, draws)) for draws in drawn]
    return {
        branch: {n: torch.cat([part[branch][n].cpu() for part in parts]) for n in sorted(layers)}
        for branch, layers in parts[0].items()
    }


def factors(network: RandomPEFT, draws: Draws) -> dict[str, Tensor]:
    """The PEFT weights of some draws, as `sizes` and `head_norms` take them.

    A network that is linearised around the weights A* and B* does not have the product B A, but
    its first-order part B A* + B* (A - A*). This is a product too, of factors of twice the rank.
    """
    weights = network.coordinates({name: value[:, 0] for name, value in draws.weights.items()})
    if draws.at is None:
        return weights
    middle = network.coordinates({name: value[None] for name, value in draws.at.items()})
    for sides in _branches(network).values():
        if len(sides) == 2:
            a, b = sides["input"].name, sides["output"].name
            a0, b0 = middle[a].expand_as(weights[a]), middle[b].expand_as(weights[b])
            weights[a] = torch.cat([a0, weights[a] - a0], -2)
            weights[b] = torch.cat([weights[b], b0], -1)
    return weights


def _branches(network: RandomPEFT) -> dict[str, dict[Role, Site]]:
    """The sites of each branch by their side; those that all layers share, and gates, are left
    out."""
    branches: dict[str, dict[Role, Site]] = {}
    for site in network.attachment.sites:
        if "layer" in site.dims and site.role != "gate":
            kind, part = site.name.split(".")[:2]
            branch = kind if kind == "adapter" else f"{kind}.{part}"
            branches.setdefault(branch, {})[site.role] = site
    return branches


def sizes(network: RandomPEFT, weights: Mapping[str, Tensor]) -> ByLayer:
    """The size of what each branch adds, as a share of the frozen output that it is added to.

    For LoRA and adapters it is the RMS of what B A adds to a linear layer's output, over the RMS
    of that output, for inputs of the measured RMS without a preferred direction; an adapter's
    activation counts by its mean effect. For prefixes it is the RMS of the keys or values over
    that of the text's own (with an encoder, that of its output side alone). Gates count as open as
    they are at the start.

    Args:
        network: with the PEFT kinds.
        weights: the PEFT weights themselves, not their coordinates: site name to `(S, *shape)`;
            or the `factors` of a linearised network.

    Returns:
        Branch to layer number to (S,).
    """
    by_branch: ByLayer = {}
    for branch, sides in _branches(network).items():
        # In units in which N(0, 1) entries make a branch as large as the frozen signal.
        scaled = {r: (weights[site.name] / site.unit).unbind(1) for r, site in sides.items()}
        pair, (site, *_) = len(sides) == 2, sides.values()
        rank = sides["input"].shape[-2] if pair else 1
        changes = map(matmul, scaled["output"], scaled["input"]) if pair else scaled[site.role]
        by_branch[branch] = {
            layer: (change.flatten(1).square().mean(1) / rank).sqrt()
            for layer, change in zip(site.layers, changes, strict=True)
        }
    return by_branch


def head_norms(network: RandomPEFT, weights: Mapping[str, Tensor]) -> ByLayer:
    """The Frobenius norm of LoRA's delta W by attention head: of the rows that make its outputs.

    Args:
        network, weights: as for `sizes`.

    Returns:
        Branch ("lora.query", "lora.key", "lora.value") to layer number to (S, heads); keys and
        values have fewer heads where queries share them.

    >>> from bhpeft_pyro.testing import tiny_model
    >>> network = tiny_model().network
    >>> weights = {site.name: torch.ones(1, *site.shape) for site in network.attachment.sites}
    >>> head_norms(network, weights)["lora.query"][0]
    tensor([[181.0193, 181.0193]])
    """
    config, factors = network.backbone.config, {kind.name: kind.factor for kind in network.kinds}
    norms: ByLayer = {}
    for branch, sides in _branches(network).items():
        if branch not in _HEADS:
            continue
        heads = getattr(config, _HEADS[branch], None) or config.num_attention_heads
        a, b = (weights[sides[side].name].unbind(1) for side in ("input", "output"))
        norms[branch] = {}
        for layer, down, up in zip(sides["input"].layers, a, b, strict=True):
            # With A' = Q R the rows of B R' are as long as those of B A, and have fewer entries.
            rows = factors["lora"] * up @ torch.linalg.qr(down.mT).R.mT
            norms[branch][layer] = rows.unflatten(1, (heads, -1)).flatten(2).norm(dim=2)
    return norms


@dataclass(frozen=True, eq=False)
class Variable:
    """Draws of one quantity.

    Attributes:
        values: (S, *shape).
        dims: names of the dims of the shape, if they are known.
        layers: the layers' numbers along "layer".
    """

    values: Tensor
    dims: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()

    @property
    def numel(self) -> int:
        """Numbers per draw."""
        return self.values[0].numel()


def variables(model: Model, draws: Draws) -> dict[str, Variable]:
    """Everything that draws of the latents and sites contain, by name: the draws, and what
    docs/arviz.md lists."""
    network, drawn = model.network, {name: value[:, 0] for name, value in draws.weights.items()}
    sites = {site.name: site for site in model.sites}
    readable = {name: _variable(name, values, sites) for name, values in drawn.items()}
    if network.kinds:
        weights = factors(network, draws)
        for what, dims, by_branch in (
            ("change", ("layer",), sizes(network, weights)),
            ("head_norm", ("layer", "head"), head_norms(network, weights)),
        ):
            for branch, by_layer in by_branch.items():
                numbers = tuple(sorted(by_layer))
                stacked = torch.stack([by_layer[number] for number in numbers], 1)
                readable[f"{what}.{branch}"] = Variable(stacked, dims, numbers)
    if network.axes is not None and network.axes.fitted:
        effect = (drawn["head.weight"] * network.axes.sds).flip(-1)
        readable["head.effect"] = Variable(effect, ("output", "axis"))
    return readable


def _variable(name: str, values: Tensor, sites: Mapping[str, Site]) -> Variable:
    if name in sites:
        return Variable(values, sites[name].dims, sites[name].layers)
    of, _, what = name.rpartition(".")
    site = sites.get(of)
    if site is not None and what in _LATENTS:
        return Variable(values, site.dims[: _LATENTS[what]], site.layers)
    return Variable(values)


@dataclass(frozen=True)
class Shift:
    """The shift of some weights from prior to posterior.

    Attributes:
        moved: root mean square of (posterior mean - prior mean) / prior sd; 1 for draws of the
            prior itself.
        narrowed: geometric mean of posterior sd / prior sd; 0 for point estimates.
        kl: sum of the KLs of the weights' marginals, in nats: the whole KL if the weights are
            independent; infinite for point estimates.
    """

    moved: float
    narrowed: float
    kl: float


def shifts(posterior: Posterior) -> dict[str, dict[int | None, Shift]]:
    """How far the last round's data moved the weights from its prior, layer by layer.

    The prior of a first round is the model's; that of an update is the posterior of the round
    before. Layers that the new data did not need are near 0 prior sds and a ratio of 1, which a
    comparison of the weights themselves would not show.

    Args:
        posterior: of one of this package's guides, under independent Normals or an earlier
            posterior; for a mixture the mean over its components, each from its own prior.

    Returns:
        Kind ("lora", "adapter", "prefix", "head", ...) to layer number (None if it has no layers)
        to the shift.

    Raises:
        GuideError: a guide without known means and sds.
        PriorError: a prior that is not Normal, samples scales, or has observations or factors.

    >>> from bhpeft_pyro import fit
    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> fitted = fit(tiny_model(), "normal", tiny_examples(), max_steps=2, progress=False)
    >>> {kind: list(layers) for kind, layers in shifts(fitted).items()}
    {'lora': [0, 1], 'head': [None]}
    """
    moments: dict[tuple[str, int | None], list[list[Tensor]]] = {}
    for part in posterior.components:
        layers = {site.name: site.layers for site in part.model.sites}
        for name, four in _moments(part).items():
            for i, layer in enumerate(layers[name] or (None,)):
                of_layer = [t[i] for t in four] if layers[name] else four
                moments.setdefault((name.split(".")[0], layer), []).append(of_layer)
    by_kind: dict[str, dict[int | None, Shift]] = {}
    for (kind, layer), pieces in sorted(moments.items(), key=lambda item: item[0][1] or 0):
        loc0, sd0, loc, sd = (
            torch.cat([t.flatten() for t in same]) for same in zip(*pieces, strict=True)
        )
        kl = torch.inf
        if (sd > 0).all():
            kl = kl_divergence(Normal(loc, sd), Normal(loc0, sd0)).sum().item()
            kl /= len(posterior.components)
        by_kind.setdefault(kind, {})[layer] = Shift(
            moved=((loc - loc0) / sd0).square().mean().sqrt().item(),
            narrowed=(sd / sd0).log().mean().exp().item(),
            kl=kl,
        )
    return by_kind


def _moments(posterior: Posterior) -> dict[str, list[Tensor]]:
    """For each site the prior's mean and sd, then the posterior's, all of the site's shape."""
    guide, model = posterior.guide, posterior.model
    before, alone = dict[str, tuple[Tensor, Tensor]](), []
    for latent in latents(model):
        if latent.sites:  # of an earlier posterior
            means = unpack(latent.prior.mean, latent.sites)
            sds = unpack(latent.prior.stddev, latent.sites)
            before |= {name: (means[name], sds[name]) for name in latent.sites}
        else:
            alone.append(latent.name)
    if alone:
        before |= independent_normals(model.prior, model.sites, alone, "shifts")
    if guide.scales() or guide.point:
        means, sds = guide.means(), guide.scales()
    else:
        try:
            prior = prior_of(model, guide)
        except GuideError as error:
            raise GuideError(
                f"shifts: the means and sds of {guide.title()} are not known; expected one of "
                "bhpeft_pyro.guides"
            ) from error
        near = earlier_posterior(prior, "shifts").independent()
        bases: dict[str, Any] = {name: base_of(q) for name, q in near.distributions.items()}
        means, sds = ({k: getattr(b, part) for k, b in bases.items()} for part in ("loc", "scale"))
    moments = {}
    for name, two in before.items():
        mean = means[name]
        four = (*two, mean, sds.get(name, torch.zeros_like(mean)))
        moments[name] = [t.detach().double().cpu() for t in four]
    return moments
