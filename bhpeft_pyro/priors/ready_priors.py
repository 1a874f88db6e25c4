"""The ready priors: the default, whose scales are set by the effect of the weights, and four with
random scales, for 'normal' and Pyro's guides (not 'laplace').

These also serve as examples for priors of your own (docs/priors.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Self

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions.transforms import ExpTransform

from ..base.values import Inside, Positive, checked_dataclass
from ..peft.sites import Site

_PACKAGE = __name__.rpartition(".")[0]
_CHANGE, _HEAD = 0.1, 1.0
_COLUMNS = (("layer", "rank"), ("layer", "bottleneck"))


@checked_dataclass
class FunctionSpaceNormal:
    """Independent Normals, with sds in the sites' units so that they mean the same on every
    backbone.

    Args:
        change: sd of the output side (LoRA B, adapter up, prefix values); by default 0.1. In
            fitted `Coordinates` each such site of each layer moves the predictions by change^2
            nats under the prior; in others it changes its block's output by this fraction.
        spread: sd of the input side (LoRA A, adapter down, prefix keys) around its anchor.
        head: sd of each output (logit) under the prior of the head's weights; by default 1. If
            neither `change` nor `head` is given, a `laplace` guide sets the scale of every site by
            its effect on the outputs.
        other: sd of the likelihood's own sites.

    Raises:
        ConfigError: a number is not positive and finite.

    >>> from bhpeft_pyro.model.head import Head
    >>> prior = FunctionSpaceNormal(head=2.0)
    >>> sorted(prior(Head(3).sites(16)))
    ['head.bias', 'head.weight']
    """

    change: Positive | None = None
    spread: Positive = 0.1
    head: Positive | None = None
    other: Positive = 1.0

    @property
    def open(self) -> bool:
        """Whether a `laplace` guide sets the scales of the sites."""
        return type(self) is FunctionSpaceNormal and self.change is None and self.head is None

    @property
    def vectorised(self) -> bool:
        """Whether it handles the dims of draws itself, as those of this package do."""
        return type(self).__module__.startswith(_PACKAGE)

    def scale(self, site: Site) -> float:
        """The prior sd of a site, in its units."""
        match site.role:
            case "input":
                return self.spread
            case "output":
                return _CHANGE if self.change is None else self.change
            case "gate":  # what it multiplies has the scale `change` already
                return _CHANGE
            case "head":
                return _HEAD if self.head is None else self.head
            case "other":
                return self.other

    def with_fixed_scales(self) -> Self:
        """This prior with its default scales in place of None.

        >>> FunctionSpaceNormal(head=2.0).with_fixed_scales()
        FunctionSpaceNormal(change=0.1, spread=0.1, head=2.0, other=1.0)
        """
        return replace(
            self,
            change=_CHANGE if self.change is None else self.change,
            head=_HEAD if self.head is None else self.head,
        )

    def sd(self, site: Site) -> Tensor:
        """The prior sd of a site's weights, broadcastable to its shape."""
        return self.scale(site) * site.unit

    def loc(self, site: Site) -> Tensor:
        """The prior mean of a site: its anchor, or zero."""
        return torch.zeros_like(site.unit) if site.anchor is None else site.anchor

    def __call__(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        return {site.name: self.sample(site) for site in sites}

    def sample(self, site: Site) -> Tensor:
        """Sample one site, and what its scale depends on; for subclasses."""
        return self.normal(site)

    def normal(self, site: Site, factor: Tensor | float = 1.0) -> Tensor:
        """Sample a site as N(loc, (sd * factor)^2), given a factor `(*P, *broadcastable)`."""
        normal = dist.Normal(self.loc(site), self.sd(site) * factor)
        lead = normal.batch_shape[: len(normal.batch_shape) - site.ndim]
        value: Tensor = pyro.sample(site.name, normal.expand(lead + site.shape).to_event(site.ndim))
        return value

    def non_centred(self, site: Site, factor: Tensor) -> Tensor:
        """Compute a site as loc + sd * factor * a standard Normal ("<site>.standard").

        Data say little about single PEFT weights. In this form weights and their scale are then
        nearly independent in the posterior, as a mean-field guide assumes.
        """
        zero = torch.zeros_like(site.unit)
        standard = pyro.sample(
            f"{site.name}.standard",
            dist.Normal(zero, torch.ones_like(zero)).expand(site.shape).to_event(site.ndim),
        )
        made = self.loc(site) + self.sd(site) * factor * standard
        value: Tensor = pyro.deterministic(site.name, made, event_dim=site.ndim)
        return value


def along(values: Tensor, site: Site, dims: Sequence[str]) -> Tensor:
    """`(*P, *sizes)` by `dims` to `(*P, *sizes and ones)`, broadcastable to the site.

    >>> site = Site("lora.query.B", (6, 9, 4), ("layer", "out", "rank"), torch.ones(1), lambda: ...)
    >>> along(torch.ones(2, 1, 6, 4), site, ("layer", "rank")).shape
    torch.Size([2, 1, 6, 1, 4])
    """
    lead = values.shape[: values.dim() - len(dims)]
    sizes = (n if dim in dims else 1 for dim, n in zip(site.dims, site.shape, strict=True))
    return values.reshape(*lead, *sizes)


def log_of(positive: TorchDistribution) -> TorchDistribution:
    """The distribution of the logarithm, which is real-valued as Normal guides are.

    >>> log_of(dist.HalfCauchy(torch.ones(3))).icdf(torch.tensor(0.5))
    tensor([0., 0., 0.])
    """
    return dist.TransformedDistribution(positive, [ExpTransform().inv])


def default() -> FunctionSpaceNormal:
    """The prior used when none is given."""
    return FunctionSpaceNormal()


@checked_dataclass
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

    overall: Positive = 0.5
    between: Positive = 0.5

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


@checked_dataclass
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


@checked_dataclass
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

    share: Positive = 0.1

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


@checked_dataclass
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

    probability: Inside = 0.5
    relaxation: Positive = 0.5

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
