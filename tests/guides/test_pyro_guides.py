"""Pyro's autoguides as posteriors that are saved, and as the next round's prior."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import WIDTH, hierarchical
from pyro import poutine
from pyro.infer import autoguide as pyro_guides
from torch import Tensor
from torch.distributions import MultivariateNormal

import bhpeft_pyro as bh
from bhpeft_pyro.errors import GuideError, SaveError
from bhpeft_pyro.guides import PyroGuide
from bhpeft_pyro.priors import JointPrior, PosteriorPrior
from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_model, tiny_tokenizer

QUICK: dict[str, Any] = {"max_steps": 2, "progress": False}
FAMILIES: list[tuple[Any, dict[str, Any], type]] = [
    ("AutoNormal", {"init_scale": 0.05}, PosteriorPrior),
    ("AutoDiagonalNormal", {}, PosteriorPrior),
    ("mvn", {"init_scale": 0.05}, JointPrior),
    ("AutoLowRankMultivariateNormal", {"rank": 3}, JointPrior),
    ("structured", {"init_scale": 0.05}, JointPrior),
]


def fitted(family: Any, options: dict[str, Any], model: bh.Model | None = None) -> bh.Posterior:
    model = tiny_model(()) if model is None else model
    guide = bh.autoguide(family, model, **options)
    return bh.fit(model, guide, tiny_examples(16), **QUICK, lr=0.05)


def loaded(posterior: bh.Posterior, folder: Path) -> bh.Posterior:
    posterior.save(folder)
    return bh.Posterior.load(folder, tiny_backbone(), tokenizer=tiny_tokenizer())


def same(one: bh.Posterior, other: bh.Posterior) -> bool:
    data = tiny_examples(20, seed=9)
    return all(
        torch.equal(*(each.predict(data, samples).probabilities for each in (one, other)))
        for samples in (0, 5)
    )


@pytest.mark.parametrize(("family", "options", "kind"), FAMILIES, ids=str)
def test_it_is_saved_becomes_a_prior_and_goes_on(
    family: Any, options: dict[str, Any], kind: type, tmp_path: Path
) -> None:
    posterior = fitted(family, options)
    again = loaded(posterior, tmp_path / "1")
    assert same(posterior, again)
    assert isinstance(posterior.as_prior(), kind)
    second, other = (p.update(tiny_examples(8, seed=3), **QUICK) for p in (posterior, again))
    assert same(second, other) and not same(posterior, second)
    assert same(posterior, again)  # the old round stays
    assert same(second, loaded(second, tmp_path / "2"))


@pytest.mark.parametrize(("family", "options", "kind"), FAMILIES, ids=str)
def test_the_prior_has_the_posterior_s_density(
    family: Any, options: dict[str, Any], kind: type
) -> None:
    posterior = fitted(family, options)
    guide, prior = posterior.guide, posterior.as_prior()
    model = bh.Model(posterior.model.network, prior)
    with pyro.get_param_store().scope():
        trace = poutine.trace(guide).get_trace(None)
    values = {name: trace.nodes[name]["value"] for name in ("head.weight", "head.bias")}
    own = trace.log_prob_sum().item()
    data: dict[str, Tensor] = dict(values)
    if not isinstance(prior, PosteriorPrior):
        data = {"weights": torch.cat([values[name].flatten() for name in prior.shapes])}  # type: ignore[attr-defined]
    conditioned = poutine.trace(poutine.condition(prior, data)).get_trace(model.sites)
    assert conditioned.log_prob_sum().item() == pytest.approx(own, rel=1e-3, abs=2e-2)
    for name, value in values.items():
        assert torch.equal(conditioned.nodes[name]["value"], value)


def test_what_starts_under_its_own_posterior_has_no_kl() -> None:
    """A second round starts with log q - log p = 0, draw by draw."""
    for family, options, kind in FAMILIES:
        posterior = fitted(family, options)
        model = bh.Model(posterior.model.network, posterior.as_prior())
        assert isinstance(posterior.guide, PyroGuide)
        posterior.guide.follow(model)
        elbo = bh.ELBO(4)
        batch = next(tiny_examples(8).batches(8)).split(4)
        with torch.no_grad(), pyro.get_param_store().scope():
            elbo(model, posterior.guide)(batch)
        assert elbo.parts is not None
        total = sum(value.item() for value in elbo.parts.kl.values())
        assert total == pytest.approx(0.0, abs=0.05), (family, kind)


def test_a_structured_posterior_has_the_moments_of_its_draws() -> None:
    posterior = fitted("structured", {"init_scale": 0.3})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in posterior.guide.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    prior = posterior.as_prior()
    assert isinstance(prior, JointPrior)
    with torch.no_grad(), pyro.get_param_store().scope(), pyro.plate("draws", 20_000, dim=-2):
        draws = posterior.guide(None)
    rows = torch.cat([draws[name].reshape(20_000, -1) for name in prior.shapes], 1).double()
    size = len(prior.normal.loc)
    matrix = torch.stack([prior.normal.covariance.apply(row) for row in torch.eye(size)]).double()
    expected = MultivariateNormal(prior.normal.loc.double(), matrix)
    off = torch.cov(rows.T) - matrix
    sds = expected.stddev
    assert ((rows.mean(0) - expected.mean) / sds).abs().max() < 0.03
    assert (off / torch.outer(sds, sds)).abs().max() < 0.05
    correlation = matrix / torch.outer(sds, sds) - torch.eye(size)
    assert correlation.abs().max() > 0.2  # something to get wrong


def test_another_family_takes_over_from_pyro_s_and_back() -> None:
    first = fitted("mvn", {"init_scale": 0.1})
    second = first.update(tiny_examples(8, seed=3), guide="full", max_steps=2)
    assert second.report.projection == pytest.approx(0.0, abs=1e-3)
    third = second.update(tiny_examples(8, seed=4), guide="AutoNormal", max_steps=2)
    assert isinstance(third.guide, PyroGuide)
    prior = third.model.prior
    assert isinstance(prior, PosteriorPrior)
    means = second.guide.means()  # type: ignore[operator]
    assert torch.equal(prior.distributions["head.weight"].mean, means["head.weight"])


def test_a_flow_is_fitted_and_saved_but_is_no_prior(tmp_path: Path) -> None:
    posterior = fitted("iaf", {"hidden_dim": [40]})
    assert same(posterior, loaded(posterior, tmp_path))
    with pytest.raises(GuideError, match="does not say how its posterior becomes a prior"):
        posterior.update(tiny_examples(8, seed=3))


def test_points_and_extra_latents_are_no_joint_prior() -> None:
    for family in ("AutoDelta", "AutoLaplaceApproximation"):
        posterior = fitted(family, {})
        with pytest.raises(GuideError, match=f"{family} is a point"):
            posterior.as_prior()
    wide = fitted("mvn", {}, tiny_model((), prior=hierarchical))
    with pytest.raises(GuideError, match="AutoMultivariateNormal also holds tau"):
        wide.as_prior()
    scaled = fitted("AutoNormal", {}, tiny_model((), prior=hierarchical))
    assert scaled.update(tiny_examples(8, seed=3), **QUICK).report.steps == 2
    deps = {"head.weight": {}, "head.bias": {"head.weight": "linear"}}
    mixed = fitted(
        "structured",
        {"conditionals": {"head.weight": "delta", "head.bias": "mvn"}, "dependencies": deps},
    )
    with pytest.raises(GuideError, match=r"'normal' or 'mvn'.*'delta'"):
        mixed.as_prior()


def test_maps_by_pyro_are_saved(tmp_path: Path) -> None:
    for family in ("AutoDelta", "AutoLaplaceApproximation"):
        posterior = fitted(family, {})
        assert same(posterior, loaded(posterior, tmp_path / family))


class Own(pyro_guides.AutoNormal):
    pass


def test_what_plain_data_cannot_make_again_says_what_to_do(tmp_path: Path) -> None:
    flow = {"init_transform_fn": lambda size: dist.transforms.affine_autoregressive(size)}
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (Own, {}, r"Own is none of Pyro's own.*state_dict.*guide='normal'"),
        (pyro_guides.AutoNormalizingFlow, flow, "was made with.*state_dict"),
    ]
    for number, (family, options, message) in enumerate(cases):
        posterior = fitted(family, options)
        with pytest.raises(SaveError, match=message):
            posterior.save(tmp_path / str(number))
        assert not (tmp_path / str(number)).exists()


def test_hidden_layers_narrower_than_the_latents_are_refused() -> None:
    with pytest.raises(GuideError, match=r"'iaf' does not take \{'hidden_dim': \[5\]\}: Hidden"):
        bh.autoguide("iaf", tiny_model(()), hidden_dim=[5])
    assert WIDTH > 5


def test_dependencies_that_are_found_are_kept_in_the_next_round() -> None:
    posterior = fitted("structured", {}, tiny_model())
    second = posterior.update(tiny_examples(8, seed=3), **QUICK)
    first, then = (each.guide.auto.dependencies for each in (posterior, second))  # type: ignore[union-attr]
    assert "lora.query.B" in first and then == first
    with pytest.raises(GuideError, match="structured before a fit"):
        bh.autoguide("structured", tiny_model()).as_prior()
