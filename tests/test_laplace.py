"""The Laplace guide against exact posteriors, and its structures against each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from counts import COUNTS, Counts
from exact import WIDTH, Exact, flat, hierarchical, own_network, random_texts, ratings, regression
from memory import Memory
from torch import Tensor

import bhpeft_pyro as bh
from bhpeft_pyro.distributions import Covariance
from bhpeft_pyro.errors import ConfigError, GuideError, PriorError
from bhpeft_pyro.guides import LaplaceGuide
from bhpeft_pyro.inference.feed import Feed
from bhpeft_pyro.inference.laplace import measured
from bhpeft_pyro.kronecker import KroneckerCovariance
from bhpeft_pyro.priors import JointPrior
from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_model, tiny_tokenizer

NOISE = 2.0
STRUCTURES = ("dense", "diagonal", "kronecker")
FIT: dict[str, Any] = {"max_steps": 150, "batch_size": 64, "lr": 0.1, "progress": False}
QUICK: dict[str, Any] = {"max_steps": 2, "progress": False}


def data(model: bh.Model, count: int, seed: int) -> bh.Examples:
    return ratings(model.network, random_texts(count, seed), seed=seed, noise=NOISE)


def fitted(structure: str, model: bh.Model | None = None) -> bh.Posterior:
    model = tiny_model() if model is None else model
    guide = bh.autoguide("laplace", model, structure=structure)
    return bh.fit(model, guide, tiny_examples(16), **QUICK)


def dense(covariance: Covariance) -> Tensor:
    rows = torch.eye(len(covariance.scale))
    return torch.stack([covariance.apply(row) for row in rows]).double()


def guide_of(posterior: bh.Posterior) -> LaplaceGuide:
    assert isinstance(posterior.guide, LaplaceGuide)
    return posterior.guide


@pytest.mark.parametrize("structure", STRUCTURES)
def test_it_meets_the_exact_posterior_in_both_rounds(structure: str) -> None:
    """Of a linear regression: the mean, and of the precision what the structure keeps."""
    model = regression(own_network(), noise=NOISE)
    parts = [data(model, 64, 3), data(model, 48, 4)]
    posterior = bh.fit(model, bh.autoguide("laplace", model, structure=structure), parts[0], **FIT)
    exact = Exact.of(model, parts[0])
    mean = flat(posterior.guide.means())  # type: ignore[operator]
    assert ((mean - exact.mean) / exact.sd).abs().max() < 0.02
    first = torch.linalg.inv(dense(guide_of(posterior).covariance))
    second = posterior.update(parts[1])
    later = torch.linalg.inv(dense(guide_of(second).covariance))
    together = Exact.of(model, parts[0].concat(parts[1]))
    close: dict[str, Any] = {"rtol": 1e-2, "atol": 1e-2}
    if structure == "dense":
        torch.testing.assert_close(first, exact.precision, **close)
        torch.testing.assert_close(later, together.precision, **close)
        mean = flat(second.guide.means())  # type: ignore[operator]
        assert ((mean - together.mean) / together.sd).abs().max() < 0.05
    elif structure == "diagonal":
        torch.testing.assert_close(first.diagonal(), exact.precision.diagonal(), **close)
        torch.testing.assert_close(later.diagonal(), together.precision.diagonal(), **close)
        assert (later - torch.diag(later.diagonal())).abs().max() < 1e-3
    else:  # one output of constant noise: exact within each site
        for site in (slice(0, WIDTH), slice(WIDTH, WIDTH + 1)):
            torch.testing.assert_close(first[site, site], exact.precision[site, site], **close)
        assert first[WIDTH, :WIDTH].abs().max() < 1e-3 < exact.precision[WIDTH, :WIDTH].abs().max()
    drawn = flat(posterior.sample(800))
    sds = guide_of(posterior).covariance.variance.double().sqrt()
    assert (drawn.std(0) / sds).log().abs().max() < 0.1


def test_kronecker_is_dense_where_the_factorisation_is_exact() -> None:
    """One example of three classes: (diag(p) - p p') (x) x x', within a site."""
    model = tiny_model((), outputs=3, prior=bh.priors.FunctionSpaceNormal(head=1.0))
    one = tiny_examples(1)
    feed = Feed(model, one)
    found = {}
    for structure in ("dense", "kronecker"):
        guide = LaplaceGuide(model, structure)
        with torch.no_grad():
            guide.loc.copy_(torch.linspace(-0.5, 0.5, len(guide.loc)))
        found[structure] = torch.linalg.inv(dense(measured(model, guide, feed, 50.0)))
    for site in (slice(0, 48), slice(48, 51)):
        here, there = (found[structure][site, site] for structure in ("kronecker", "dense"))
        torch.testing.assert_close(here, there, rtol=1e-2, atol=1e-2 * there.abs().max().item())
    off = found["dense"] - torch.diag(found["dense"].diagonal())
    assert off[:48, :48].abs().max() > 1  # there are correlations to get wrong


def test_narrow_directions_are_exact_in_bfloat16_too() -> None:
    """Its eight bits do not tell them from others."""
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(1, size, size, generator=generator))[0] for size in (32, 16)
    )
    ratio = torch.where(torch.arange(512) % 8 == 0, 0.02, 1.0)
    covariance = KroneckerCovariance(torch.ones(512), ratio, ((left, right),))
    value = torch.randn(512, generator=generator)
    expected = covariance.unroot(value)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(covariance.unroot(value), expected)


def test_draws_along_kronecker_axes_copy_no_factor() -> None:
    """Broadcast matmuls copied every factor for every draw: 300 MB for 16 draws of BERT-base."""
    layers, wide, narrow, draws = 2, 16, 3, 8
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(layers, size, size, generator=generator))[0]
        for size in (wide, narrow)
    )
    scale = 0.5 + torch.rand(layers * wide * narrow, generator=generator)
    ratio = torch.rand(scale.shape, generator=generator)
    for factors in ((left, right), (right, left)):
        covariance = KroneckerCovariance(scale, ratio, (factors,))
        noise = torch.randn(draws, 1, len(scale), generator=generator)
        with Memory() as memory:
            root = covariance.root(noise)
        assert memory.largest == noise.numel()
        axes = torch.block_diag(*(torch.kron(*pair) for pair in zip(*factors, strict=True)))
        exact = scale * (noise @ axes * ratio @ axes.T)
        torch.testing.assert_close(root, exact, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_it_is_saved_and_goes_on(structure: str, tmp_path: Path) -> None:
    posterior = fitted(structure)
    unseen = tiny_examples(12, seed=9)
    for number in (1, 2):
        posterior.save(tmp_path / str(number))
        again = bh.Posterior.load(
            tmp_path / str(number), tiny_backbone(), tokenizer=tiny_tokenizer()
        )
        assert torch.equal(*(p.predict(unseen, 3).probabilities for p in (posterior, again)))
        here, there = (
            p.update(tiny_examples(8, seed=2 + number), **QUICK) for p in (posterior, again)
        )
        assert here.report.kl == there.report.kl and here.report.kl["weights"] > 0
        posterior = here
    assert isinstance(posterior.model.prior, JointPrior)
    assert posterior.report.scales.keys() == {site.name for site in posterior.model.sites}


def test_it_predicts_by_the_linearised_network() -> None:
    posterior, unseen = fitted("kronecker"), tiny_examples(12, seed=9)
    default, linear, network = (
        posterior.predict(unseen, 8, linear=choice).probabilities for choice in (None, True, False)
    )
    assert torch.equal(default, linear) and not torch.allclose(default, network)


def test_what_cannot_work_is_refused() -> None:
    model = tiny_model(())
    guide = bh.autoguide("laplace", model)
    for ask in (guide.as_prior, guide.scales):
        with pytest.raises(GuideError, match="laplace before a fit"):
            ask()
    with pytest.raises(GuideError, match=r"structure='full' is none of dense, diagonal, kronecker"):
        bh.autoguide("laplace", model, structure="full")
    with pytest.raises(GuideError, match="also samples tau"):
        bh.autoguide("laplace", tiny_model((), prior=hierarchical))
    with pytest.raises(ConfigError, match=r"temperature=0 is maximum likelihood"):
        bh.fit(model, guide, tiny_examples(), temperature=0.0, **QUICK)
    with pytest.raises(GuideError, match=r"'laplace' would take 34 latents.*max_bytes"):
        bh.autoguide("laplace", model, structure="dense", max_bytes=1000)
    posterior = fitted("kronecker", model)
    more = tiny_examples(8, seed=3)
    for how in ({"guide": "full"}, {"keep": 0.5}):
        with pytest.raises(PriorError, match="Kronecker-factored"):
            posterior.update(more, **how)
    assert posterior.update(more, guide="normal", **QUICK).report.projection > 0  # type: ignore[operator]


def test_outcomes_that_are_drawn_are_the_same_ones_again() -> None:
    """Those of a likelihood of one's own; the global random state is left alone."""
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        model = tiny_model((), outputs=1, likelihood=Counts())
        found.append(bh.fit(model, "laplace", COUNTS, **QUICK))
        assert torch.equal(torch.get_rng_state(), before)
    one, other = (guide_of(posterior).scales() for posterior in found)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_prior_with_correlations_is_refused_before_any_step() -> None:
    joint = bh.fit(tiny_model(()), "lowrank", tiny_examples(), max_steps=10, progress=False)
    model = bh.Model(joint.model.network, joint.as_prior())
    with pytest.raises(GuideError, match="this one is joint: expected structure='dense'"):
        bh.autoguide("laplace", model)
