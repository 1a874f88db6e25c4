"""What may be exported: draws of the weights, and what a person can read of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import change
from ..peft.sites import Site
from ..priors.gates import gated_layers

if TYPE_CHECKING:
    from ..posterior import Posterior

__all__ = ["Variable", "variables"]

# What the ready priors sample besides the sites, by the end of its name: over which of the dims of
# its site; and what they sample for each of its weights.
_LATENTS = {"log_layers": {"layer"}, "log_ranks": {"layer", "rank", "bottleneck"}}
_BY_WEIGHT = {"standard", "log_local"}


@dataclass(frozen=True, eq=False)
class Variable:
    """Draws of one quantity.

    Attributes:
        values: (S, *shape).
        dims: names of the dims of the shape; where they are unknown, none.
        layers: the layers' numbers along "layer".
    """

    values: Tensor
    dims: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()

    @property
    def numel(self) -> int:
        """Numbers a draw."""
        return self.values[0].numel()


def variables(posterior: Posterior, draws: Mapping[str, Tensor]) -> dict[str, Variable]:
    """All that there is in draws of the latents and sites, by name.

    Besides themselves, named by what they are of:

    * `change.<branch>` (layer): the change that a PEFT branch makes (`change.sizes`);
    * `spectrum.lora.<target>` (layer, rank): the singular values of delta W (`change.spectra`), and
      `effective_rank.lora.<target>` (layer): with s^2 their squares, (sum s^2)^2 / sum s^4;
    * `head_norm.lora.<target>` (layer, head): the norm of delta W by attention head;
    * `gate.<kind>` (layer): how far a gate of `priors.Gates` is open, from 0 to 1;
    * `head.effect` (output, axis): how far a label's logit moves with one sd of the texts along a
      principal axis of the features, axis 0 the one along which texts differ most.

    Args:
        posterior: the posterior.
        draws: (S, *shape) by name, of the posterior or its prior.
    """
    model = posterior.model
    sites = {site.name: site for site in model.sites}
    found = {name: _variable(name, values, sites) for name, values in draws.items()}
    network = model.network
    if network.kinds:
        weights = change.of_transformer(network, draws)
        spectra = change.spectra(network, weights)
        for what, dim, by_branch in (
            ("change", None, change.sizes(network, weights)),
            ("spectrum", "rank", spectra),
            ("effective_rank", None, _each(spectra)),
            ("head_norm", "head", change.head_norms(network, weights)),
        ):
            dims = ("layer",) if dim is None else ("layer", dim)
            for branch, by_layer in by_branch.items():
                numbers = tuple(sorted(by_layer))
                stacked = torch.stack([by_layer[number] for number in numbers], 1)
                found[f"{what}.{branch}"] = Variable(stacked, dims, numbers)
    for kind, layers in gated_layers(model.sites).items():
        if (logits := draws.get(f"gates.{kind}")) is not None:
            found[f"gates.{kind}"] = Variable(logits, ("layer",), tuple(layers))
            found[f"gate.{kind}"] = Variable(logits.sigmoid(), ("layer",), tuple(layers))
    if network.axes is not None and network.axes.fitted:
        effect = (draws["head.weight"] * network.axes.sds).flip(-1)
        found["head.effect"] = Variable(effect, ("output", "axis"))
    return found


def _variable(name: str, values: Tensor, sites: Mapping[str, Site]) -> Variable:
    if name in sites:
        return Variable(values, sites[name].dims, sites[name].layers)
    of, _, what = name.rpartition(".")
    site = sites.get(of)
    if site is not None and (what in _BY_WEIGHT or what in _LATENTS):
        dims = tuple(dim for dim in site.dims if what in _BY_WEIGHT or dim in _LATENTS[what])
        return Variable(values, dims, site.layers)
    return Variable(values)


def _each(spectra: Mapping[str, Mapping[int, Tensor]]) -> dict[str, dict[int, Tensor]]:
    """Effective ranks (S,) of (S, rank) singular values."""
    return {
        branch: {layer: _effective(values.square()) for layer, values in layers.items()}
        for branch, layers in spectra.items()
    }


def _effective(power: Tensor) -> Tensor:
    return power.sum(-1).square() / power.square().sum(-1)
