"""Linear regressions whose weights go by the names of PEFT sites: what was planted is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from exact import KnownNoise, hadamard
from torch import Tensor

import bhpeft_pyro as bh
from bhpeft_pyro.peft.sites import Role, Site
from bhpeft_pyro.priors import PriorLike
from bhpeft_pyro.testing import tiny_backbone, tiny_tokenizer

Truth = Mapping[str, Tensor]


def site(name: str, shape: tuple[int, ...], *dims: str) -> Site:
    """A site of unit 1, of the head or of an output side."""
    layers = tuple(range(shape[0])) if "layer" in dims else ()
    unit = torch.ones((1,) * len(shape))
    role: Role = "head" if name.startswith("head.") else "output"
    return Site(name, shape, dims, unit, lambda: torch.zeros(shape), layers, role=role)


class Planted(bh.RandomPEFT):
    """output = sum of all weights times features: an orthogonal design, N rows of +-1."""

    def __init__(self, sites: Sequence[Site], rows: int) -> None:
        super().__init__(tiny_backbone(), (), bh.Head(1, principal=False), tiny_tokenizer())
        self.sites = tuple(sites)
        self.table = hadamard(rows)[:, : sum(site.numel for site in sites)]

    def features(self, batch: bh.Batch) -> Tensor:
        words = batch.inputs["input_ids"] - 5
        return self.table[words[:, 0] * 45 + words[:, 1]]

    def forward(self, weights: Mapping[str, Tensor], batch: bh.Batch) -> Tensor:
        flat = torch.cat([weights[site.name].flatten(-site.ndim) for site in self.sites], -1)
        features = self.features(batch) if batch.features is None else batch.features
        if batch.particles > 1:
            features = features.unflatten(0, (batch.particles, -1))
        return (features * flat).sum(-1, keepdim=True)


def planted(
    truth: Truth, sites: Sequence[Site], prior: PriorLike, rows: int, noise: float, seed: int = 0
) -> tuple[bh.Model, bh.Examples]:
    """A model and ratings from true weights."""
    network = Planted(sites, rows)
    texts = [f"w{5 + i // 45} w{5 + i % 45}" for i in range(rows)]
    weights = torch.cat([truth[site.name].flatten() for site in sites])
    errors = torch.randn(rows, generator=torch.Generator().manual_seed(seed))
    labels = network.table @ weights + noise * errors
    data = bh.encode({"text": texts, "label": labels.tolist()}, network.tokenizer, kind="rating")
    return bh.Model(network, prior, KnownNoise(noise)), data
