"""Priors with random scales on linear regressions: what is planted, or exact, is known.

The design is orthogonal. With X'X = N I the least-squares weights h = X'y / N are sufficient, and
given its scale each is N(0, scale^2 + noise^2 / N): every scale's posterior is a quadrature. Each
test of a selection also shows that a plain Normal prior fails it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from exact import KnownNoise, hadamard
from recipes import recipe
from torch import Tensor
from torch.distributions import Normal

import bhpeft_pyro as bh
from bhpeft_pyro import priors
from bhpeft_pyro.peft.sites import Role, Site
from bhpeft_pyro.testing import tiny_backbone, tiny_tokenizer

FIT: dict[str, Any] = {"lr": 0.1, "progress": False, "max_steps": 300}
NORMAL = priors.FunctionSpaceNormal(change=1.0, head=2.0)

pytestmark = pytest.mark.slow


def site(name: str, shape: tuple[int, ...], *dims: str) -> Site:
    """A site of unit 1, of the head or of an output side."""
    layers = tuple(range(shape[0])) if "layer" in dims else ()
    role: Role = "head" if name.startswith("head.") else "output"
    unit = torch.ones((1,) * len(shape))
    return Site(name, shape, dims, unit, lambda: torch.zeros(shape), layers, role=role)


class Planted(bh.RandomPEFT):
    """output = sum of all weights times features: an orthogonal design, N rows of +-1."""

    def __init__(self, sites: Sequence[Site], rows: int) -> None:
        super().__init__(tiny_backbone(), (), bh.Head(1, principal=False), tiny_tokenizer())
        self.sites = tuple(sites)
        self.table = hadamard(rows)[:, : sum(site.numel for site in sites)]

    def features(self, batch: bh.data.Batch) -> Tensor:
        words = batch.inputs["input_ids"] - 5
        return self.table[words[:, 0] * 45 + words[:, 1]]

    def forward(self, weights: Mapping[str, Tensor], batch: bh.data.Batch) -> Tensor:
        flat = torch.cat([weights[site.name].flatten(-site.ndim) for site in self.sites], -1)
        features = self.features(batch) if batch.features is None else batch.features
        if batch.particles > 1:
            features = features.unflatten(0, (batch.particles, -1))
        return (features * flat).sum(-1, keepdim=True)


def planted(
    truth: dict[str, Tensor], sites: Sequence[Site], prior: Any, rows: int, noise: float
) -> tuple[bh.Model, bh.data.Examples]:
    """A model and ratings from true weights."""
    network = Planted(sites, rows)
    texts = [f"w{5 + i // 45} w{5 + i % 45}" for i in range(rows)]
    weights = torch.cat([truth[site.name].flatten() for site in sites])
    errors = torch.randn(rows, generator=torch.Generator().manual_seed(0))
    labels = network.table @ weights + noise * errors
    data = bh.data.encode(
        {"text": texts, "label": labels.tolist()}, network.tokenizer, kind="rating"
    )
    return bh.Model(network, prior, KnownNoise(noise)), data


def fit(model: bh.Model, data: bh.data.Examples, **options: Any) -> bh.Posterior:
    posterior = bh.fit(model, "normal", data, **{**FIT, "batch_size": len(data), **options})
    assert not posterior.report.falling
    return posterior


def least_squares(model: bh.Model, data: bh.data.Examples) -> dict[str, Tensor]:
    network = model.network
    assert isinstance(network, Planted) and data.labels is not None
    flat = network.table.double().T @ data.labels.double() / len(data)
    parts = flat.split([s.numel for s in network.sites])
    return {s.name: part.reshape(s.shape) for s, part in zip(network.sites, parts, strict=True)}


def moments(grid: Tensor, log_density: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sd, along the first dim, of what is proportional to exp(log_density) on a grid."""
    p = log_density.softmax(0)
    grid = grid.reshape(-1, *[1] * (p.dim() - 1))
    mean = (p * grid).sum(0)
    return mean, ((p * grid.square()).sum(0) - mean.square()).sqrt()


def test_ard_recovers_a_planted_rank() -> None:
    b = site("lora.query.B", (2, 8, 8), "layer", "out", "rank")
    truth = torch.zeros(b.shape)
    columns = hadamard(8)
    truth[0][:, [5]] = columns[:, [1]]
    truth[1][:, [0, 2, 7]] = columns[:, [2, 4, 7]]
    found = {}
    for name, prior in (("ard", recipe("ard", NORMAL)), ("normal", NORMAL)):
        model, data = planted({b.name: truth}, [b], prior, 128, 3.0)
        how = {**FIT, "batch_size": len(data), "max_steps": 400}
        # Not `fit`: the loss still falls, as the scales of unused columns go on shrinking.
        draws = bh.fit(model, "normal", data, **how).sample(200)[b.name]
        # Columns in use: (sum p)^2 / sum p^2 of their squared lengths, geometric means over draws.
        power = draws.square().sum(2).log().mean(0).softmax(-1)
        found[name] = (1 / power.square().sum(-1)).tolist()
    assert found["ard"] == pytest.approx([1, 3], abs=0.4)
    assert found["normal"][0] > 1.6 and found["normal"][1] > 3.6


# Scales

GRID = torch.linspace(-6, 3, 361, dtype=torch.float64)


def log_evidence(h: Tensor, noise: float, rows: int) -> Tensor:
    """(grid, layer): of the weights (layer, ...) given each log scale of the grid."""
    sd = ((2 * GRID).exp() + noise**2 / rows).sqrt()
    return Normal(0.0, sd.reshape(-1, 1, 1)).log_prob(h.flatten(1)).sum(-1)


def compare_scales(found: Tensor, mean: Tensor, sd: Tensor) -> None:
    """(draw, scale) of a guide with exact moments; mean-field posteriors are too narrow."""
    assert ((found.mean(0) - mean) / sd).abs().max() < 0.4
    ratio = found.std(0) / sd
    assert ratio.max() < 1.15 and ratio.min() > 0.4


def test_hierarchical_scales_over_layers_against_quadrature() -> None:
    b = site("lora.query.B", (4, 6, 2), "layer", "out", "rank")
    scales = torch.tensor([0.2, 0.5, 1.0, 2.0]).reshape(-1, 1, 1)
    truth = scales * torch.randn(b.shape, generator=torch.Generator().manual_seed(1))
    prior = priors.Hierarchical(change=1.0)
    model, data = planted({b.name: truth}, [b], prior, 64, 8.0)
    evidence = log_evidence(least_squares(model, data)[b.name], 8.0, 64)
    given = Normal(GRID.unsqueeze(-1), 0.5).log_prob(GRID)  # of a layer's scale, (overall, layer's)
    joint = given.unsqueeze(-1) + evidence
    overall = (Normal(-0.5, 0.5).log_prob(GRID) + joint.logsumexp(1).sum(1)).log_softmax(0)
    layers = (overall[:, None, None] + joint - joint.logsumexp(1, keepdim=True)).logsumexp(0)
    draws = fit(model, data).sample(2000)
    compare_scales(draws["lora.query.B.log_layers"].double(), *moments(GRID, layers))
    mean, sd = moments(GRID, overall)
    compare_scales(draws["lora.query.B.log_scale"].double()[:, None], mean[None], sd[None])
    assert (moments(GRID, layers)[0][3] - moments(GRID, layers)[0][0]) > 0.7  # layers do differ
