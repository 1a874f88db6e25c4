"""Ready priors on linear regressions with an orthogonal design: what is true, or exact, is known.

With X'X = N I the least-squares weights h = X'y / N are sufficient, and given its scale each is
N(0, scale^2 + noise^2 / N): every scale's posterior is a quadrature. Each test of a selection
also shows that a plain Normal prior would fail it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from exact import Exact, hadamard
from planted import Planted, planted, site
from torch import Tensor
from torch.distributions import Laplace, Normal, StudentT
from torch.nn.functional import softplus

import bhpeft_pyro as bh
from bhpeft_pyro import priors
from bhpeft_pyro.errors import PriorError
from bhpeft_pyro.peft.sites import Site
from bhpeft_pyro.priors import effective_rank, empirical_scales, gate_probabilities

FIT: dict[str, Any] = {"lr": 0.1, "warmup": 0.0, "progress": False, "max_steps": 300}
NORMAL = priors.FunctionSpaceNormal(change=1.0, head=2.0)


def fit(model: bh.Model, data: bh.Examples, **options: Any) -> bh.Posterior:
    posterior = bh.fit(model, "normal", data, **{**FIT, "batch_size": len(data), **options})
    assert not posterior.report.unsettled
    return posterior


def least_squares(model: bh.Model, data: bh.Examples) -> dict[str, Tensor]:
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


# Heavy tails

HEAD = site("head.weight", (1, 16), "output", "feature")
WEIGHTS = torch.tensor([6.0, -4.0, 1.0, 0.5] + [0.0] * 12).reshape(1, 16)


@pytest.mark.parametrize(
    ("prior", "density"),
    [
        (priors.Laplace(head=1.0), Laplace(0.0, 0.5**0.5)),
        (priors.StudentT(head=1.0, df=3.0), StudentT(3.0, 0.0, 3.0**-0.5)),
    ],
)
def test_heavy_tails_against_quadrature(prior: Any, density: Any) -> None:
    model, data = planted({HEAD.name: WEIGHTS}, [HEAD], prior, 16, 2.0)
    h = least_squares(model, data)[HEAD.name]
    grid = torch.linspace(-12, 12, 6001, dtype=torch.float64)
    log_prior = density.log_prob(grid).reshape(-1, 1, 1)
    mean, sd = moments(grid, log_prior + Normal(h, 2.0 / 4).log_prob(grid.reshape(-1, 1, 1)))
    draws = fit(model, data).sample(2000)[HEAD.name].double()
    assert ((draws.mean(0) - mean) / sd).abs().max() < 0.3
    assert (draws.std(0) / sd).log().abs().max() < 0.35  # a Normal in place of a skewed density
    # With a Normal prior the largest weight would be shrunk by more than that allows.
    normal = h / (1 + 4 / 16)
    assert ((normal - mean) / sd).abs().max() > 0.5


# Selection


def test_ard_recovers_a_planted_rank() -> None:
    b = site("lora.query.B", (2, 8, 8), "layer", "out", "rank")
    truth = torch.zeros(b.shape)
    columns = hadamard(8)
    truth[0][:, [5]] = columns[:, [1]]
    truth[1][:, [0, 2, 7]] = columns[:, [2, 4, 7]]
    found = {}
    for prior in (priors.ARD(change=1.0), NORMAL):
        model, data = planted({b.name: truth}, [b], prior, 128, 3.0)
        (ranks,) = effective_rank(fit(model, data, max_steps=400)).values()
        found[type(prior)] = ranks
    assert found[priors.ARD] == {0: pytest.approx(1, abs=0.4), 1: pytest.approx(3, abs=0.4)}
    assert all(
        rank > planted + 0.6
        for rank, planted in zip(found[priors.FunctionSpaceNormal].values(), (1, 3), strict=True)
    )


def kinds() -> tuple[list[Site], dict[str, Tensor]]:
    """Three kinds on three layers, of which four are needed; LoRA's layers are 1, 4 and 5."""
    sites = [
        site("lora.query.B", (3, 5, 2), "layer", "out", "rank"),
        site("adapter.up", (3, 5, 2), "layer", "out", "bottleneck"),
        site("prefix.value", (3, 5, 2), "layer", "out", "position"),
    ]
    sites[0] = replace(sites[0], layers=(1, 4, 5))
    needed = {"lora.query.B": [1], "adapter.up": [0, 2], "prefix.value": [1]}
    generator = torch.Generator().manual_seed(3)
    truth = {}
    for s in sites:
        truth[s.name] = torch.zeros(s.shape)
        for layer in needed[s.name]:
            truth[s.name][layer] = 1.2 * torch.randn(s.shape[1:], generator=generator)
    return sites, truth


def test_gates_recover_planted_layers_and_meet_the_exact_probabilities() -> None:
    sites, truth = kinds()
    prior = priors.Gates(change=1.0)
    model, data = planted(truth, sites, prior, 128, 4.0)
    found = gate_probabilities(fit(model, data, max_steps=500))
    assert list(found["lora"]) == [1, 4, 5]
    logits = torch.linspace(-60, 60, 12001, dtype=torch.float64)
    z = logits * prior.relaxation
    log_prior = -z - 2 * softplus(-z)  # the logistic density
    sd = (logits.sigmoid().square() + 16.0 / 128).sqrt()
    for name, h in least_squares(model, data).items():
        kind = name.split(".")[0]
        for layer, (number, q) in enumerate(found[kind].items()):
            evidence = Normal(0.0, sd.unsqueeze(-1)).log_prob(h[layer].flatten()).sum(-1)
            p = (evidence + log_prior).softmax(0)[logits > 0].sum().item()
            assert q == pytest.approx(p, abs=0.15), (name, number)
            needed = bool(truth[name][layer].any())
            assert q > 0.8 if needed else q < 0.2, (name, number)


def test_the_horseshoe_shrinks_planted_zeros_and_leaves_planted_large_weights() -> None:
    s = site("head.weight", (1, 48), "output", "feature")
    truth = torch.zeros(1, 48)
    large = [3, 11, 20, 40]
    truth[0, large] = torch.tensor([3.0, -3.0, 2.5, -2.5])
    errors = {}
    for prior in (priors.Horseshoe(head=2.0), NORMAL):
        model, data = planted({s.name: truth}, [s], prior, 64, 3.0)
        h = least_squares(model, data)[s.name]
        mean = fit(model, data).sample(500)[s.name].mean(0)
        zeros = mean[truth == 0].square().mean().sqrt().item()
        errors[type(prior)] = (zeros, (mean[0, large] / h[0, large]).min().item())
    zeros, kept = errors[priors.Horseshoe]
    assert zeros < 0.1 and kept > 0.8
    assert errors[priors.FunctionSpaceNormal][0] > 0.25  # least squares: 3 / 8


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


def test_the_head_s_hierarchical_scale_against_quadrature() -> None:
    s = site("head.weight", (1, 24), "output", "feature")
    truth = 0.4 * torch.randn(s.shape, generator=torch.Generator().manual_seed(1))
    model, data = planted({s.name: truth}, [s], priors.Hierarchical(head=1.0), 32, 1.0)
    evidence = log_evidence(least_squares(model, data)[s.name], 1.0, 32)[:, 0]
    mean, sd = moments(GRID, Normal(-0.25, 0.5).log_prob(GRID) + evidence)
    assert abs(mean + 0.25) > 2 * sd  # it learns
    draws = fit(model, data).sample(2000)["head.weight.log_scale"].double()
    compare_scales(draws[:, None], mean[None], sd[None])


@pytest.mark.parametrize("true_scale", [0.3, 3.0])
def test_the_empirical_bayes_scale_has_the_highest_exact_evidence(
    true_scale: float, tmp_path: Any
) -> None:
    s = site("head.weight", (1, 24), "output", "feature")
    truth = true_scale * torch.randn(s.shape, generator=torch.Generator().manual_seed(2))
    model, data = planted({s.name: truth}, [s], priors.EmpiricalBayes(head=1.0), 32, 1.0)
    assert isinstance(model.network, Planted) and data.labels is not None
    x, y = model.network.table.double(), data.labels.double()
    grid = torch.linspace(-3, 2, 501).exp().tolist()
    best = max(grid, key=lambda sd: Exact(x, y, sd, 1.0).log_evidence)
    posterior = fit(model, data, max_steps=400)
    assert empirical_scales(posterior) == {"head.weight": pytest.approx(best, rel=0.06)}
    # and it stays what it was found to be
    later = posterior.update(data, max_steps=30, again=True)
    assert empirical_scales(later) == pytest.approx(empirical_scales(posterior), rel=0.02)


@pytest.mark.parametrize("function", [effective_rank, empirical_scales, gate_probabilities])
def test_what_a_posterior_cannot_tell_is_an_error(function: Any) -> None:
    model, data = planted({HEAD.name: WEIGHTS}, [HEAD], NORMAL, 16, 2.0)
    posterior = bh.fit(model, "normal", data, max_steps=1, progress=False)
    with pytest.raises(PriorError, match=function.__name__):
        function(posterior)
