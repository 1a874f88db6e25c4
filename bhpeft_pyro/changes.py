"""How much the PEFT weights change the frozen transformer, by branch and layer.

How far a round moved the weights from its prior, by PEFT kind and layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from .distributions import base_of
from .errors import GuideError, PriorError
from .guides import Guide, LaplaceGuide, latents
from .inference.draws import blocks
from .model.network import RandomPEFT
from .peft import LoRA
from .peft.sites import Role
from .posterior.posterior import MixturePosterior, Posterior
from .priors import unpack

__all__ = [
    "Shift",
    "changes",
    "head_norms",
    "shifts",
    "sizes",
    "spectra",
]


# The configuration's number of attention heads whose outputs a branch's output is made of.
_HEADS = {
    "lora.query": "num_attention_heads",
    "lora.key": "num_key_value_heads",
    "lora.value": "num_key_value_heads",
}


def changes(posterior: Posterior, samples: int = 64, seed: int = 0) -> dict[str, dict[int, Tensor]]:
    """The sizes of `sizes` under draws of the posterior.

    Returns:
        Branch ("lora.query", "adapter", "prefix.key", ...) to layer number to (samples,).

    >>> from bhpeft_pyro import fit
    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> fitted = fit(tiny_model(), "normal", tiny_examples(), max_steps=2, progress=False)
    >>> {branch: list(layers) for branch, layers in changes(fitted).items()}
    {'lora.query': [0, 1], 'lora.value': [0, 1]}
    """
    network = posterior.model.network
    found: dict[str, dict[int, list[Tensor]]] = {}
    for block in blocks(posterior.model, posterior.guide, samples, seed):
        weights = of_transformer(
            network, {site.name: block[site.name][:, 0] for site in network.sites}
        )
        for branch, layers in sizes(network, weights).items():
            for layer, size in layers.items():
                found.setdefault(branch, {}).setdefault(layer, []).append(size.cpu())
    return {
        branch: {layer: torch.cat(parts) for layer, parts in sorted(layers.items())}
        for branch, layers in found.items()
    }


def of_transformer(network: RandomPEFT, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The PEFT weights themselves, `(S, *shape)` by site, from their coordinates."""
    return network.coordinates(values)


def sizes(network: RandomPEFT, weights: Mapping[str, Tensor]) -> dict[str, dict[int, Tensor]]:
    """What each branch adds, as a share of the frozen signal it is added to.

    For LoRA and adapters the RMS of what B A adds to its linear layer's output, over the RMS of
    that output, for inputs of the measured RMS with no preferred direction; an adapter's activation
    counts by its mean effect. For prefixes the RMS of the keys and values over that of the
    text's own (with an encoder: that of its output side alone). A gate counts as open as it is at
    the start.

    Args:
        network: whose PEFT kinds they are.
        weights: the PEFT weights themselves, not their coordinates: site name to `(S, *shape)`.

    Returns:
        Branch to layer number to (S,).
    """
    sides: dict[str, dict[int, dict[Role, Tensor]]] = {}
    for site in network.attachment.sites:
        if "layer" not in site.dims or site.role == "gate":
            continue
        kind, part = site.name.split(".")[:2]
        branch = kind if kind == "adapter" else f"{kind}.{part}"
        # In units that make N(0, 1) entries a branch as large as the frozen signal.
        scaled = (weights[site.name] / site.unit).unbind(1)
        for layer, value in zip(site.layers, scaled, strict=True):
            sides.setdefault(branch, {}).setdefault(layer, {})[site.role] = value
    return {
        branch: {layer: _size(parts) for layer, parts in layers.items()}
        for branch, layers in sides.items()
    }


def spectra(network: RandomPEFT, weights: Mapping[str, Tensor]) -> dict[str, dict[int, Tensor]]:
    """The singular values of what LoRA adds to each weight matrix, delta W = alpha / rank B A.

    Their squares sum to its squared Frobenius norm. A gate (UniPELT's) is left out.

    Args:
        network: whose PEFT kinds they are.
        weights: the PEFT weights themselves, as for `sizes`.

    Returns:
        Branch ("lora.query", ...) to layer number to (S, rank), the largest first.

    >>> from bhpeft_pyro.testing import tiny_model
    >>> network = tiny_model().network
    >>> weights = {site.name: torch.ones(1, *site.shape) for site in network.attachment.sites}
    >>> spectra(network, weights)["lora.query"][0].round()  # 8 B A has 16 rows of 16 sixteens
    tensor([[256.,   0.]])
    """
    return {
        branch: {layer: torch.linalg.svdvals(core) for layer, core in layers.items()}
        for branch, layers in _cores(network, weights).items()
    }


def head_norms(network: RandomPEFT, weights: Mapping[str, Tensor]) -> dict[str, dict[int, Tensor]]:
    """The Frobenius norm of LoRA's delta W by attention head: of the rows that make its outputs.

    Args:
        network: whose PEFT kinds they are.
        weights: the PEFT weights themselves, as for `sizes`.

    Returns:
        Branch ("lora.query", "lora.key", "lora.value") to layer number to (S, heads); fewer heads
        for keys and values where queries share them.

    >>> from bhpeft_pyro.testing import tiny_model
    >>> network = tiny_model().network
    >>> weights = {site.name: torch.ones(1, *site.shape) for site in network.attachment.sites}
    >>> head_norms(network, weights)["lora.query"][0]
    tensor([[181.0193, 181.0193]])
    """
    config = network.backbone.config
    queries = config.num_attention_heads
    found: dict[str, dict[int, Tensor]] = {}
    for branch, layers in _cores(network, weights).items():
        if branch in _HEADS:
            heads = getattr(config, _HEADS[branch], None) or queries
            found[branch] = {
                layer: core.unflatten(1, (heads, -1)).flatten(2).norm(dim=2)
                for layer, core in layers.items()
            }
    return found


def _cores(network: RandomPEFT, weights: Mapping[str, Tensor]) -> dict[str, dict[int, Tensor]]:
    """LoRA's delta W Q, with Q' the orthonormal rows that A's span: (S, out, rank).

    It has the singular values and the norms of rows of delta W itself, which is larger.
    """
    lora = next((kind for kind in network.kinds if isinstance(kind, LoRA)), None)
    if lora is None:
        return {}
    found: dict[str, dict[int, Tensor]] = {}
    for target in lora.targets:
        a, b = (_by_layer(network, weights, f"lora.{target}.{side}") for side in "AB")
        found[f"lora.{target}"] = {
            layer: lora.alpha / lora.rank * b[layer] @ torch.linalg.qr(a[layer].mT).R.mT
            for layer in sorted(a)
        }
    return found


def _by_layer(network: RandomPEFT, weights: Mapping[str, Tensor], name: str) -> dict[int, Tensor]:
    """Layer number to (S, ...), of a site or, where layers differ in width, of several."""
    return {
        layer: value
        for site in network.attachment.sites
        if site.name == name or site.name.startswith(f"{name}.")
        for layer, value in zip(site.layers, weights[site.name].unbind(1), strict=True)
    }


def _size(sides: Mapping[Role, Tensor]) -> Tensor:
    if len(sides) == 1:  # a prefix's keys, or values
        (only,) = sides.values()
        return only.flatten(1).square().mean(1).sqrt()
    product = sides["output"] @ sides["input"]
    return product.flatten(1).square().mean(1).sqrt() / sides["input"].shape[-2] ** 0.5


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
