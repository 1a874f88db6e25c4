"""Priors with random scales, for 'normal' and Pyro's guides (not 'laplace').

They also serve as examples for priors of your own (docs/priors.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ..errors import PriorError
from ..peft.sites import Site
from .function_space import FunctionSpaceNormal, along, log_of

_COLUMNS = (("layer", "rank"), ("layer", "bottleneck"))


@dataclass(frozen=True)
class Hierarchical(FunctionSpaceNormal):
    """For 'normal' and Pyro's guides: a scale for every site, and one for every layer around it
    (partial pooling).

        log_scale   ~ N(-v, overall^2)           a site ("<site>.log_scale")
        log_layers  ~ N(log_scale, between^2)    each of its layers ("<site>.log_layers")
        weight      ~ N(loc, (sd * exp(log_layers))^2)

    With v = overall^2 + between^2 the marginal sd of a weight is that of `FunctionSpaceNormal`.
    Sites with layers are non-centred. The head, which the data determine well, is centred and has
    the first scale only.

    Args:
        overall: sd of a site's log scale.
        between: sd of the log scales of its layers.

    >>> from bhpeft_pyro.model.head import Head
    >>> list(pyro.poutine.trace(Hierarchical()).get_trace(Head(3).sites(16)).stochastic_nodes)
    ['head.weight.log_scale', 'head.weight', 'head.bias.log_scale', 'head.bias']
    """

    overall: float = 0.5
    between: float = 0.5

    def sample(self, site: Site) -> Tensor:
        zero = site.unit.new_zeros(())
        layered = "layer" in site.dims
        variance = self.overall**2 + (self.between**2 if layered else 0.0)
        log_scale = pyro.sample(
            f"{site.name}.log_scale", dist.Normal(zero - variance, self.overall)
        )
        if not layered:
            return self.normal(site, along(log_scale, site, ()).exp())
        layers = log_scale.unsqueeze(-1).expand(*log_scale.shape, site.shape[0])
        log_layers = pyro.sample(
            f"{site.name}.log_layers", dist.Normal(layers, self.between).to_event(1)
        )
        return self.non_centred(site, along(log_layers, site, ("layer",)).exp())


@dataclass(frozen=True)
class ARD(FunctionSpaceNormal):
    """For 'normal' and Pyro's guides: a scale for each layer and rank of LoRA's B, and for each
    bottleneck unit of adapters and of prefix encoders (automatic relevance determination).

        log_ranks ~ log HalfNormal(1)             ("<site>.log_ranks", layer x rank)
        column    ~ N(0, (sd * exp(log_ranks))^2)

    The marginal sd of a weight is that of `FunctionSpaceNormal`. Columns that the data do not need
    shrink towards 0, where the half-Normal has mass. A needs no scales, because a row of A has no
    effect without its column of B. All other sites are Normal.

    >>> from bhpeft_pyro.testing import tiny_model
    >>> trace = pyro.poutine.trace(ARD()).get_trace(tiny_model().sites)
    >>> [name for name in trace.stochastic_nodes if "log" in name]
    ['lora.query.B.log_ranks', 'lora.value.B.log_ranks']
    """

    def sample(self, site: Site) -> Tensor:
        dims = next((dims for dims in _COLUMNS if {*dims} <= {*site.dims}), None)
        if dims is None or site.role != "output":
            return self.normal(site)
        sizes = [site.shape[site.dims.index(dim)] for dim in dims]
        log_ranks = pyro.sample(
            f"{site.name}.log_ranks",
            log_of(dist.HalfNormal(site.unit.new_ones(sizes))).to_event(len(dims)),
        )
        return self.non_centred(site, along(log_ranks, site, dims).exp())


@dataclass(frozen=True)
class Horseshoe(FunctionSpaceNormal):
    """For 'normal' and Pyro's guides: the regularised horseshoe (Piironen and Vehtari 2017), with a
    scale for every weight that has much mass at zero and heavy tails up to a slab.

        log_tau   ~ log HalfCauchy(share)                 a site ("<site>.log_tau")
        log_local ~ log HalfCauchy(1)                     a weight ("<site>.log_local")
        weight    ~ N(loc, (sd * t / sqrt(1 + t^2))^2),   t = exp(log_tau + log_local)

    The sds of `FunctionSpaceNormal` are the slab's, the most that a weight can get. The number of
    latents doubles. In a network with fitted coordinates, "few weights" are few axes of the Fisher
    information.

    Args:
        share: roughly the expected share of weights that matter.

    >>> from bhpeft_pyro.model.head import Head
    >>> trace = pyro.poutine.trace(Horseshoe()).get_trace(Head(3).sites(16)[:1])
    >>> list(trace.stochastic_nodes)
    ['head.weight.log_tau', 'head.weight.log_local', 'head.weight.standard']
    """

    share: float = 0.1

    def sample(self, site: Site) -> Tensor:
        one = site.unit.new_ones(())
        log_tau = pyro.sample(f"{site.name}.log_tau", log_of(dist.HalfCauchy(self.share * one)))
        log_local = pyro.sample(
            f"{site.name}.log_local",
            log_of(dist.HalfCauchy(one.expand(site.shape))).to_event(site.ndim),
        )
        log_t = along(log_tau, site, ()) + log_local
        share_of_slab = (2 * log_t).sigmoid().sqrt()  # t / sqrt(1 + t^2) without overflow
        return self.non_centred(site, share_of_slab)


@dataclass(frozen=True)
class Gates(FunctionSpaceNormal):
    """For 'normal' and Pyro's guides: a gate in (0, 1) for each PEFT kind and layer, which
    multiplies the weights of the output side (a relaxed spike and slab).

        logits ~ Logistic(logit(probability) / relaxation, 1 / relaxation)   ("gates.<kind>", layer)
        weight = gate * slab,   gate = sigmoid(logits),   slab ~ N(0, sd^2)

    The gates have a binary Concrete distribution (Maddison et al. 2017): P(gate > 1/2) is
    `probability`, and with a small `relaxation` gates are nearly 0 or 1. All sites of a kind (LoRA
    on queries and on values) share their gates. The sds of `FunctionSpaceNormal` are the slab's.
    Input sides, head and likelihood are Normal. `to_arviz` exports the gates as `gate.<kind>`.

    Args:
        probability: the prior probability that a layer needs a kind.
        relaxation: the temperature of the relaxed gates.

    >>> from bhpeft_pyro.testing import tiny_model
    >>> trace = pyro.poutine.trace(Gates()).get_trace(tiny_model().sites)
    >>> trace.nodes["gates.lora"]["value"].shape
    torch.Size([2])
    """

    probability: float = 0.5
    relaxation: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.probability < 1:
            raise PriorError(f"Gates: probability must be below 1, got {self.probability}")

    def __call__(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        layers = gated_layers(sites)
        openness = torch.logit(torch.tensor(self.probability)).item() / self.relaxation
        gates: dict[str, Tensor] = {}
        values = {}
        for site in sites:
            if site.role != "output":
                values[site.name] = self.normal(site)
                continue
            kind = _kind(site)
            if kind not in gates:
                loc = site.unit.new_full((len(layers[kind]),), openness)
                logits = dist.Logistic(loc, 1 / self.relaxation).to_event(1)
                gates[kind] = pyro.sample(f"gates.{kind}", logits).sigmoid()
            open_by = gates[kind][..., [layers[kind].index(number) for number in site.layers]]
            values[site.name] = self.non_centred(site, along(open_by, site, ("layer",)))
        return values


def gated_layers(sites: Sequence[Site]) -> dict[str, list[int]]:
    """The numbers of the layers that have each PEFT kind."""
    layers: dict[str, set[int]] = {}
    for site in sites:
        if site.role == "output":
            layers.setdefault(_kind(site), set()).update(site.layers)
    return {kind: sorted(numbers) for kind, numbers in layers.items()}


def _kind(site: Site) -> str:
    return site.name.split(".")[0]
