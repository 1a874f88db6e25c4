"""How much the PEFT weights change each layer of the frozen transformer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, matmul

from ..base.values import Amount, Seed, checked_call
from ..model.model import Model
from ..model.network import RandomPEFT
from ..peft.sites import Role, Site
from ..posterior.posterior import Posterior
from ..prediction.draws import Draws, draw_parts

__all__ = ["changes", "sizes"]

ByLayer = dict[str, dict[int, Tensor]]
"""Branch ("lora.query", "adapter", "prefix.key", ...) to layer number to values (S, ...)."""

# What ready priors sample besides a site, by the end of its name, and over how many of its dims.
_LATENTS = {"log_layers": 1, "standard": None}


@checked_call
def changes(posterior: Posterior, samples: Amount = 64, seed: Seed = 0) -> ByLayer:
    """The `sizes` of branches under draws of the posterior: branch to layer number to (samples,).

    For a mixture `samples` is rounded up to equally many draws of each component, in their order.
    With `samples=0` they are those at the central weights of each component, (components,). So are
    they always for a linearised posterior ("laplace"): its draws are not weights for the layers of
    the transformer itself, and are as wide as the prior wherever the data say nothing.

    >>> from bhpeft_pyro import fit
    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> fitted = fit(tiny_model(), "normal", tiny_examples(), max_steps=2, progress=False)
    >>> {branch: list(layers) for branch, layers in changes(fitted).items()}
    {'lora.query': [0, 1], 'lora.value': [0, 1]}
    """
    model, guides = posterior.model, posterior.guides
    if any(guide.linear for guide in guides):
        samples = 0
    parts = [
        sizes(model.network, model.network.coordinates(_values(draws)))
        for draws in draw_parts(model, guides, samples, seed)
    ]
    return {
        branch: {n: torch.cat([part[branch][n].cpu() for part in parts]) for n in sorted(layers)}
        for branch, layers in parts[0].items()
    }


def _branches(network: RandomPEFT) -> dict[str, dict[Role, Site]]:
    """The sites of each branch by their side; gates are left out."""
    branches: dict[str, dict[Role, Site]] = {}
    for site in network.attachment.sites:
        if site.role != "gate":
            kind, part = site.name.split(".")[:2]
            branch = kind if kind == "adapter" else f"{kind}.{part}"
            branches.setdefault(branch, {})[site.role] = site
    return branches


def sizes(network: RandomPEFT, weights: Mapping[str, Tensor]) -> ByLayer:
    """The size of what each branch adds, as a share of the frozen output that it is added to.

    For LoRA and adapters it is the RMS of what B A adds to a linear layer's output, over the RMS
    of that output, for inputs of the measured RMS without a preferred direction; an adapter's
    activation counts by its mean effect. For prefixes it is the RMS of the keys or values over
    that of the text's own. Gates count as open as they are at the start.

    Args:
        network: with the PEFT kinds.
        weights: the PEFT weights themselves, not their coordinates: site name to `(S, *shape)`.

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
    docs/diagnostics.md lists."""
    network, drawn = model.network, _values(draws)
    sites = {site.name: site for site in model.sites}
    readable = {name: _variable(name, values, sites) for name, values in drawn.items()}
    if draws.at is None:  # a linearised network does not add the product B A of a draw
        for branch, by_layer in sizes(network, network.coordinates(drawn)).items():
            numbers = tuple(sorted(by_layer))
            stacked = torch.stack([by_layer[number] for number in numbers], 1)
            readable[f"change.{branch}"] = Variable(stacked, ("layer",), numbers)
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


def _values(draws: Draws) -> dict[str, Tensor]:
    """The draws by name, (S, *shape), without the dim of the data plate."""
    return {name: value[:, 0] for name, value in draws.weights.items()}
