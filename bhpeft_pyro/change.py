"""How much the PEFT weights change the frozen transformer, by branch and layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .inference.draws import blocks
from .network import RandomPEFT
from .posterior import Posterior

__all__ = ["changes", "sizes"]

# The sites of a branch that is a product: its input side, its output side.
_INNER, _OUTER = ("A", "down"), ("B", "up")


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
    """The PEFT weights themselves, (S, *shape) by site, from their coordinates."""
    return values if network.coordinates is None else network.coordinates(values)


def sizes(network: RandomPEFT, weights: Mapping[str, Tensor]) -> dict[str, dict[int, Tensor]]:
    """What each branch adds, as a share of the frozen signal it is added to.

    For LoRA and adapters the RMS of what B A adds to its linear layer's output, over the RMS of
    that output, for inputs of the measured RMS with no preferred direction; an adapter's activation
    counts by its mean effect. For prefixes the RMS of the keys and values over that of the
    text's own (with an encoder: that of its output side alone). A gate counts as open as it is at
    the start.

    Args:
        network: whose PEFT kinds they are.
        weights: the PEFT weights themselves, not their coordinates: site name to (S, *shape).

    Returns:
        Branch to layer number to (S,).
    """
    sides: dict[str, dict[int, dict[str, Tensor]]] = {}
    for site in network.attachment.sites:
        kind, part, *more = site.name.split(".")
        if "layer" not in site.dims or "gate" in (part, *more):
            continue
        branch, side = (kind, part) if kind == "adapter" else (f"{kind}.{part}", "".join(more[:1]))
        # In units that make N(0, 1) entries a branch as large as the frozen signal.
        scaled = (weights[site.name] / site.unit).unbind(1)
        for layer, value in zip(site.layers, scaled, strict=True):
            sides.setdefault(branch, {}).setdefault(layer, {})[side] = value
    return {
        branch: {layer: _size(parts) for layer, parts in layers.items()}
        for branch, layers in sides.items()
    }


def _size(parts: Mapping[str, Tensor]) -> Tensor:
    inner = next((parts[side] for side in _INNER if side in parts), None)
    outer = next((parts[side] for side in _OUTER if side in parts), None)
    if inner is None or outer is None:
        (only,) = parts.values()
        return only.flatten(1).square().mean(1).sqrt()
    product = outer @ inner
    return product.flatten(1).square().mean(1).sqrt() / inner.shape[-2] ** 0.5
