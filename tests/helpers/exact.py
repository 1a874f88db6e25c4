"""Bayesian linear regression: the one model of ours whose posterior is known in closed form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

import bhpeft_pyro as bh
from bhpeft_pyro.base.distributions import Covariance
from bhpeft_pyro.model.likelihoods import Likelihood, Outputs
from bhpeft_pyro.testing import tiny_backbone, tiny_tokenizer

WIDTH = 16  # of the tiny backbone


@dataclass(frozen=True)
class KnownNoise(Likelihood):
    """Ratings with Normal noise of a known sd: nothing but the head is random."""

    sd: float = 0.5
    kind = "rating"
    outputs = 1

    def distribution(self, outputs: Outputs) -> Any:
        return dist.Normal(outputs.values[..., 0], self.sd)


class Designed(bh.RandomPEFT):
    """A head on features looked up by a text's first word: any design matrix one likes."""

    def __init__(self, table: Tensor, outputs: int = 1) -> None:
        super().__init__(tiny_backbone(), (), bh.Head(outputs, principal=False), tiny_tokenizer())
        self.table = table

    def features(self, batch: bh.data.Batch) -> Tensor:
        return self.table[batch.inputs["input_ids"][:, 0]]


def hadamard(order: int) -> Tensor:
    """(order, order), of +-1, columns orthogonal, the first of ones; `order` a power of 2."""
    matrix = torch.ones(1, 1)
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def orthogonal_network() -> Designed:
    """On the words w5 to w36 the 16 features and the bias are orthogonal."""
    table = torch.zeros(50, WIDTH)
    table[5:37] = hadamard(32)[:, 1 : WIDTH + 1]
    return Designed(table)


def own_network() -> bh.RandomPEFT:
    """A head on the tiny backbone's real features, which are far from orthogonal."""
    return bh.RandomPEFT(tiny_backbone(), (), bh.Head(1, principal=False), tiny_tokenizer())


def regression(network: bh.RandomPEFT, prior_sd: float = 0.7, noise: float = 0.5) -> bh.Model:
    """The conjugate model."""
    return bh.Model(network, dist.Normal(0.0, prior_sd), KnownNoise(noise))


def ratings(
    network: bh.RandomPEFT, texts: list[str], seed: int, noise: float = 0.5
) -> bh.data.Examples:
    """Texts with ratings from fixed true weights."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(WIDTH + 1, generator=torch.Generator().manual_seed(99)) * 0.5
    blank = bh.data.encode(texts, network.tokenizer, kind="rating", labelled=False)
    mean = design(network, blank) @ truth.double()
    labels = mean + noise * torch.randn(len(texts), generator=generator)
    return bh.data.encode(
        {"text": texts, "label": labels.tolist()}, network.tokenizer, kind="rating"
    )


def random_ratings(model: bh.Model, count: int, seed: int) -> bh.data.Examples:
    """Random texts with ratings, whose noise is that of the conjugate model."""
    noise = model.likelihood.sd  # type: ignore[attr-defined]
    return ratings(model.network, random_texts(count, seed), seed=seed, noise=noise)


def one_word_texts() -> list[str]:
    """The 32 texts on which `orthogonal_network` is orthogonal."""
    return [f"w{i}" for i in range(5, 37)]


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of 2 to 6 words."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 7, (count,), generator=generator).tolist()
    return [
        " ".join(f"w{i}" for i in torch.randint(5, 50, (n,), generator=generator).tolist())
        for n in lengths
    ]


def design(network: bh.RandomPEFT, data: bh.data.Examples) -> Tensor:
    """(N, D + 1) float64: the features and a column of ones for the bias."""
    features = network.features(next(data.batches(len(data)))).double()
    return torch.cat([features, torch.ones(len(data), 1, dtype=torch.float64)], 1)


@dataclass
class Exact:
    """The posterior over (weight, bias), in float64."""

    x: Tensor
    y: Tensor
    prior_sd: float = 0.7
    noise: float = 0.5

    @classmethod
    def of(cls, model: bh.Model, data: bh.data.Examples, prior_sd: float = 0.7) -> Exact:
        assert data.labels is not None
        noise = model.likelihood.sd  # type: ignore[attr-defined]
        return cls(design(model.network, data), data.labels.double(), prior_sd, noise)

    @cached_property
    def precision(self) -> Tensor:
        eye = torch.eye(self.x.shape[1], dtype=torch.float64)
        return self.x.T @ self.x / self.noise**2 + eye / self.prior_sd**2

    @cached_property
    def covariance(self) -> Tensor:
        return torch.linalg.inv(self.precision)

    @cached_property
    def mean(self) -> Tensor:
        return self.covariance @ self.x.T @ self.y / self.noise**2

    @property
    def mean_field_sd(self) -> Tensor:
        """Of the factorised Normal nearest in KL(q, p)."""
        return self.precision.diagonal().rsqrt()

    @property
    def sd(self) -> Tensor:
        return self.covariance.diagonal().sqrt()

    @property
    def log_evidence(self) -> float:
        eye = torch.eye(len(self.y), dtype=torch.float64)
        covariance = self.noise**2 * eye + self.prior_sd**2 * self.x @ self.x.T
        return float(MultivariateNormal(torch.zeros_like(self.y), covariance).log_prob(self.y))


def flat(values: Mapping[str, Tensor]) -> Tensor:
    """(..., D + 1) float64, in the order of `Exact`."""
    weight, bias = values["head.weight"], values["head.bias"]
    return torch.cat([weight.squeeze(-2), bias], -1).double()


def dense(covariance: Covariance) -> Tensor:
    """(D, D) float64."""
    return torch.stack([covariance.apply(row) for row in torch.eye(len(covariance.scale))]).double()


def independent(sites: Sequence[Any], sd: Any = 0.1) -> dict[str, Tensor]:
    """A prior as one writes it by hand: all weights Normal, with the same sd."""
    return {
        s.name: pyro.sample(s.name, dist.Normal(0.0, sd).expand(s.shape).to_event(s.ndim))
        for s in sites
    }


def hierarchical(sites: Sequence[Any]) -> dict[str, Tensor]:
    """One scale for all weights, itself random."""
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    values = {}
    for site in sites:
        scale = tau.reshape(tau.shape + (1,) * site.ndim).expand(tau.shape + site.shape)
        values[site.name] = pyro.sample(site.name, dist.Normal(0.0, scale).to_event(site.ndim))
    return values


def guide_of(exact: Exact, shift: float = 0.0, spread: float = 1.0) -> Callable[[Any], None]:
    """The exact posterior as a Pyro guide; or biased by `shift` sds in every weight, or with
    `spread` times its sds. The weights are parts of one auxiliary site, as in Pyro's autoguides."""
    mean = (exact.mean + shift * exact.sd).float()
    scale_tril = spread * torch.linalg.cholesky(exact.covariance).float()

    def guide(batch: Any) -> None:
        joint = dist.MultivariateNormal(mean, scale_tril=scale_tril)
        flat = pyro.sample("flat", joint, infer={"is_auxiliary": True})
        weight, bias = flat[..., :WIDTH].unsqueeze(-2), flat[..., WIDTH:]
        pyro.sample("head.weight", dist.Delta(weight, event_dim=2))
        pyro.sample("head.bias", dist.Delta(bias, event_dim=1))

    return guide
