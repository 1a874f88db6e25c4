"""The linearised network by brute force: one backward pass for each output of each example."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

import bhpeft_pyro as bh
from bhpeft_pyro.model.likelihoods import Outputs


class Linearised(bh.Model):
    """A model whose outputs are f(at) + J(at) (w - at); for a few weights and examples.

    Args:
        model: the model.
        at: a tensor of its shape for each site.
    """

    def __init__(self, model: bh.Model, at: Mapping[str, Tensor]) -> None:
        super().__init__(model.network, model.prior, model.likelihood)
        self.at = {name: value.detach() for name, value in at.items()}

    def predictive(self, weights: Mapping[str, Tensor], batch: bh.data.Batch) -> TorchDistribution:
        return self.likelihood.checked(self.outputs_under(weights, batch))

    def forward(self, batch: bh.data.Batch) -> Tensor:
        weights = self.prior(self.sites)
        return self.likelihood(self.outputs_under(weights, batch), batch)

    def outputs_under(self, weights: Mapping[str, Tensor], batch: bh.data.Batch) -> Outputs:
        return Outputs(self._linear(weights, batch), weights, batch.choices)

    def _linear(self, weights: Mapping[str, Tensor], batch: bh.data.Batch) -> Tensor:
        value, rows = derivative(bh.Model(self.network), self.at, batch)
        ways = []
        for site in self.network.sites:  # (S, 1, *shape)
            away = weights[site.name] - self.at[site.name]
            ways.append(away.reshape(len(away), -1))
        moved = torch.cat(ways, 1) @ rows.mT
        return value + moved.reshape(-1, *value.shape)


def derivative(
    model: bh.Model, at: Mapping[str, Tensor], batch: bh.data.Batch
) -> tuple[Tensor, Tensor]:
    """The outputs, and their derivatives by the network's weights, (all outputs, D)."""
    with torch.enable_grad():
        leaves = {s.name: at[s.name].clone().requires_grad_() for s in model.network.sites}
        value = model.network(leaves, batch)
        rows = [
            torch.autograd.grad(
                each,
                list(leaves.values()),
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            for each in value.flatten()
        ]
    flat = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    return value.detach(), flat


def centred(model: bh.Model, rows: Tensor, batch: bh.data.Batch) -> Tensor:
    """What `jacobian` gives for the network's outputs, of (all outputs, D) derivatives: under a
    softmax those of each output less the mean over the example's outputs, which leaves every
    probability as it is. (B, outputs, D); of choices that do not exist, zero."""
    found = rows.reshape(len(batch), -1, rows.shape[1]).clone()
    if model.likelihood.softmax:
        for i, of_one in enumerate(found):
            there = torch.ones(len(of_one), dtype=torch.bool)
            if batch.choices is not None:
                there = batch.choices[i]
            of_one[there] -= of_one[there].mean(0)
            of_one[~there] = 0
    return found
