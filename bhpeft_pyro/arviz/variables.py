"""What may be exported: draws of the weights, and what a person can read of them.

ArviZ's containers: all that differs between its versions 0.x and 1.x.

Names and coordinates of the dims of variables.

Draws of a guide, and which guides make a chain each.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from .. import changes as change
from ..inference.draws import blocks
from ..peft.sites import Site
from ..priors.structured import gated_layers

if TYPE_CHECKING:
    from ..posterior.posterior import Posterior

__all__ = [
    "Axes",
    "Variable",
    "chains",
    "chosen_draws",
    "dataset",
    "join",
    "variables",
]


with warnings.catch_warnings():  # ArviZ 0.23 announces 1.0 at every import
    warnings.simplefilter("ignore", FutureWarning)
    import arviz


def dataset(
    variables: Mapping[str, Any], coords: Mapping[str, Any], attrs: Mapping[str, Any] = {}
) -> xr.Dataset:
    """A group of draws: from variables (dims, values), their dims (chain, draw, ...)."""
    shape = next((values.shape for _, values in variables.values()), (0, 0))
    numbers = {dim: np.arange(size) for dim, size in zip(("chain", "draw"), shape, strict=False)}
    return xr.Dataset(dict(variables), coords={**numbers, **coords}, attrs=dict(attrs))


def join(groups: dict[str, xr.Dataset]) -> Any:
    """The container of the installed ArviZ."""
    for group in groups.values():
        group.attrs["inference_library"] = "bhpeft_pyro"
    if "InferenceData" in vars(arviz):  # 1.3 answers to the old name, with a DataTree
        return arviz.InferenceData(**dict[str, Any](groups))
    return xr.DataTree.from_dict(groups)


# ArviZ 1.x labels the rows of its tables rightly if each variable's dims come in the order in which
# dims first appear in the dataset: so do those of the sites, if variables are sorted by these.
_ORDER = ("layer", "kv", "position", "out", "rank", "bottleneck", "in", "output", "feature")


class Axes:
    """Names and coordinates of the dims of variables.

    A name that two variables use for dims of different size or coordinates (the layers of a
    subset, say) becomes one name a variable, "layer.adapter.up".

    Args:
        variables: by name.
        label_names: the coordinates of dims "output", if there are as many.
    """

    def __init__(
        self, variables: Mapping[str, Variable], label_names: Sequence[str] | None = None
    ) -> None:
        self._dims: dict[str, tuple[str, ...]] = {}
        self._coords: dict[str, list[Hashable]] = {}
        own = {name: _coordinates(one, label_names) for name, one in variables.items()}
        found: dict[str, set[tuple[Hashable, ...]]] = {}
        for coords in own.values():
            for dim, values in coords.items():
                found.setdefault(dim, set()).add(values)
        for variable, coords in own.items():
            names = [dim if len(found[dim]) == 1 else f"{dim}.{variable}" for dim in coords]
            self._coords |= dict(zip(names, map(list, coords.values()), strict=True))
            self._dims[variable] = tuple(names)

    def dataset(
        self, chains: Sequence[Mapping[str, Tensor]], attrs: Mapping[str, Any]
    ) -> xr.Dataset:
        """A group of the draws (S, *shape), by variable, of each chain."""
        variables = {}
        for name in sorted(chains[0], key=self._place):
            values = np.stack([chain[name].numpy() for chain in chains])
            # What a prior of one's own samples besides the sites has dims without names.
            plain = tuple(f"{name}_dim_{i}" for i in range(values.ndim - 2))
            variables[name] = (("chain", "draw", *(self._dims[name] or plain)), values)
        used = {dim for dims, _ in variables.values() for dim in dims}
        coords = {dim: values for dim, values in self._coords.items() if dim in used}
        return dataset(variables, coords, attrs)

    def _place(self, variable: str) -> list[int]:
        return [_ORDER.index(dim) if dim in _ORDER else len(_ORDER) for dim in self._dims[variable]]


def _coordinates(
    variable: Variable, label_names: Sequence[str] | None
) -> dict[str, tuple[Hashable, ...]]:
    found: dict[str, tuple[Hashable, ...]] = {}
    for dim, size in zip(variable.dims, variable.values.shape[1:], strict=bool(variable.dims)):
        found[dim] = tuple(range(size))
        if dim == "layer":
            found[dim] = variable.layers
        elif dim == "output" and label_names is not None and len(label_names) == size:
            found[dim] = tuple(label_names)
        elif dim == "kv":
            found[dim] = ("key", "value")
    return found


def chains(guide: Callable[..., Any]) -> Sequence[Callable[..., Any]]:
    """The guides whose draws are a chain each: a mixture's `components`, else the guide alone.

    Components come from independent fits and count alike: chains that differ are optima that
    differ, and all chains together are the mixture.

    >>> from bhpeft_pyro.guides import NormalGuide
    >>> from bhpeft_pyro.testing import tiny_model
    >>> len(chains(NormalGuide(tiny_model())))
    1
    """
    components: Sequence[Callable[..., Any]] = getattr(guide, "components", (guide,))
    return components


def chosen_draws(
    posterior: Posterior,
    guide: Callable[..., Any],
    chosen: Collection[str],
    samples: int,
    seed: int,
) -> dict[str, Tensor]:
    """(S, *shape) draws of the chosen variables, on the CPU; never all of all draws at once."""
    parts: dict[str, list[Tensor]] = {name: [] for name in chosen}
    for block in blocks(posterior.model, guide, samples, seed):
        drawn = variables(posterior, {name: value[:, 0] for name, value in block.items()})
        for name in chosen:
            parts[name].append(drawn[name].values.cpu())
    return {name: torch.cat(values) for name, values in parts.items()}


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
