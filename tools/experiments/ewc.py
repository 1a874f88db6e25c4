"""Elastic weight consolidation, a rival of `update` in the experiments with streams.

A penalty on changes of the weights that earlier rounds need (Kirkpatrick et al. 2017). As in
EWC-LoRA (arXiv 2602.17559), the weights of LoRA count as the product B A that they add to a linear
layer: another A and B can have the same one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pyro
import torch
from torch import Tensor

from bhpeft_pyro.data import Examples
from bhpeft_pyro.model.fisher import all_outcomes
from bhpeft_pyro.model.model import Model
from bhpeft_pyro.model.network import RandomPEFT
from bhpeft_pyro.peft.kinds import LoRA
from bhpeft_pyro.peft.sites import Site
from bhpeft_pyro.priors import default

__all__ = ["Elastic", "information", "products"]

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Elastic:
    """The default prior, with the penalty strength / 2 * sum_i precision_i (w_i - anchor_i)^2.

    Attributes:
        network: whose weights these are.
        anchor: `products` of the weights at the end of the last round.
        precision: their `information`, added up over rounds.
        strength: 1 is a Laplace approximation's.
    """

    network: RandomPEFT
    anchor: Tensors
    precision: Tensors
    strength: float

    def __call__(self, sites: Sequence[Site]) -> Mapping[str, Tensor]:
        weights = default()(sites)
        now = products(self.network, weights)
        parts = [p * (now[name] - self.anchor[name]) ** 2 for name, p in self.precision.items()]
        pyro.factor("ewc", -self.strength / 2 * torch.stack([part.sum() for part in parts]).sum())
        return weights


def products(network: RandomPEFT, weights: Tensors) -> dict[str, Tensor]:
    """The weights as the transformer sees them: by site, but of LoRA the matrix that it adds to
    each target, "lora.<target>", (layer, out, in)."""
    seen = network.coordinates(weights)
    for kind in network.kinds:
        if isinstance(kind, LoRA):
            for target in kind.targets:
                a, b = (seen.pop(f"lora.{target}.{side}") for side in "AB")
                seen[f"lora.{target}"] = kind.factor * b @ a
    return seen


def information(model: Model, weights: Tensors, data: Examples) -> dict[str, Tensor]:
    """The diagonal of the Fisher information of `products`, added up over the texts."""
    leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    parts: dict[str, list[Tensor]] = {name: [leaf] for name, leaf in leaves.items()}
    frozen: list[Tensor] = []
    for kind, layers in model.network.attachment.placed:
        if isinstance(kind, LoRA):
            for target in kind.targets:
                del parts[f"lora.{target}.A"], parts[f"lora.{target}.B"]
                # A change of the product is one of the layer's own matrix.
                modules = (layer.projections[target].module for layer in layers)
                matrices = [module.get_parameter("weight") for module in modules]
                parts[f"lora.{target}"] = [*matrices]
                frozen += matrices
    inputs = [tensor for tensors in parts.values() for tensor in tensors]
    sums = [torch.zeros_like(tensor) for tensor in inputs]
    try:
        for matrix in frozen:
            matrix.requires_grad_(True)
        for batch in data.batches(1):
            predictive = model.predictive(leaves, replace(batch, labels=None))
            for outcome in all_outcomes(predictive):
                grads = torch.autograd.grad(
                    outcome.sum(), inputs, retain_graph=True, allow_unused=True
                )
                for total, grad in zip(sums, grads, strict=True):
                    if grad is not None:
                        total += grad.square()
    finally:
        for matrix in frozen:
            matrix.requires_grad_(False)
    added = iter(sums)
    whole = {name: [next(added) for _ in tensors] for name, tensors in parts.items()}
    return {name: torch.stack(t) if name not in leaves else t[0] for name, t in whole.items()}
