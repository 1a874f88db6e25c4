"""How much the PEFT weights change the frozen transformer, by branch and layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .inference.draws import blocks
from .network import RandomPEFT
from .peft import LoRA
from .peft.sites import Role
from .posterior import Posterior

__all__ = ["changes", "head_norms", "sizes", "spectra"]

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
