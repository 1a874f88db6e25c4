"""Pyro's autoguides as posteriors that are saved, and as the next round's prior."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import hierarchical
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer import autoguide as pyro_guides
from pyro.infer.autoguide import AutoNormal
from saves import load
from scaled_priors import with_scales_named
from torch import Tensor

import bhpeft_pyro as bh
from bhpeft_pyro.errors import GuideError, SaveError
from bhpeft_pyro.guides import PyroGuide
from bhpeft_pyro.guides.pyro_guides import PYROS
from bhpeft_pyro.peft.sites import Site
from bhpeft_pyro.priors import JointPrior, PosteriorPrior
from bhpeft_pyro.testing import tiny_batch, tiny_examples, tiny_model

QUICK: dict[str, Any] = {"max_steps": 2, "progress": False}
FAMILIES: list[tuple[Any, dict[str, Any], type]] = [
    ("AutoNormal", {"init_scale": 0.05}, PosteriorPrior),
    ("AutoDiagonalNormal", {}, PosteriorPrior),
    ("mvn", {"init_scale": 0.05}, JointPrior),
    ("lowrank", {"rank": 3}, JointPrior),
]


def fitted(family: Any, options: dict[str, Any], model: bh.Model | None = None) -> bh.Posterior:
    model = tiny_model(()) if model is None else model
    guide = bh.autoguide(family, model, **options)
    return bh.fit(model, guide, tiny_examples(16), **QUICK, lr=0.05)


def loaded(posterior: bh.Posterior, folder: Path) -> bh.Posterior:
    return load(posterior.save(folder))


def same(one: bh.Posterior, other: bh.Posterior) -> bool:
    data = tiny_examples(20, seed=9)
    return all(
        torch.equal(*(each.predict(data, samples).probabilities for each in (one, other)))
        for samples in (0, 5)
    )


def check_density_of_prior(posterior: bh.Posterior, kind: type) -> None:
    """It is the posterior's, at a draw."""
    guide, prior = posterior.guide, posterior.as_prior()
    assert isinstance(prior, kind)
    with pyro.get_param_store().scope():
        trace = poutine.trace(guide).get_trace(None)
    values = {name: trace.nodes[name]["value"] for name in ("head.weight", "head.bias")}
    data: dict[str, Tensor] = dict(values)
    if isinstance(prior, JointPrior):
        data = {"weights": torch.cat([values[name].flatten() for name in prior.shapes])}
    conditioned = poutine.trace(poutine.condition(prior, data)).get_trace(posterior.model.sites)
    density = trace.log_prob_sum().item()
    assert conditioned.log_prob_sum().item() == pytest.approx(density, rel=1e-3, abs=2e-2)
    for name, value in values.items():
        assert torch.equal(conditioned.nodes[name]["value"], value)


@pytest.mark.parametrize(("family", "options", "kind"), FAMILIES, ids=str)
def test_it_is_saved_becomes_a_prior_and_goes_on(
    family: Any, options: dict[str, Any], kind: type, tmp_path: Path
) -> None:
    posterior = fitted(family, options)
    again = loaded(posterior, tmp_path / "1")
    assert same(posterior, again)
    check_density_of_prior(posterior, kind)
    second, other = (p.update(tiny_examples(8, seed=3), **QUICK) for p in (posterior, again))
    assert same(second, other) and not same(posterior, second)
    # A second round starts where its prior is: log q - log p = 0, draw by draw.
    assert 8 * second.report.history[0]["kl"] == pytest.approx(0.0, abs=0.05)
    assert same(posterior, again)  # the old round stays
    assert same(second, loaded(second, tmp_path / "2"))


def test_another_family_takes_over_from_pyro_s_and_back() -> None:
    first = fitted("mvn", {"init_scale": 0.1})
    how: dict[str, Any] = {"components": 1, "max_steps": 2, "progress": False}
    under = first.model.with_prior(first.as_prior())
    second = bh.fit(under, "laplace", tiny_examples(8, seed=3), **how)
    under = second.model.with_prior(second.as_prior().independent())  # type: ignore[attr-defined]
    third = bh.fit(under, "AutoNormal", tiny_examples(8, seed=4), **how)
    assert isinstance(third.guide, PyroGuide)
    prior = third.model.prior
    assert isinstance(prior, PosteriorPrior)
    means = second.guide.means()
    assert torch.equal(prior.distributions["head.weight"].mean, means["head.weight"])


@pytest.mark.parametrize(("family", "options"), [("iaf", {"hidden_dim": [40]}), ("structured", {})])
def test_what_has_no_closed_form_is_saved_but_cannot_be_a_prior(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    posterior = fitted(family, options)
    again = loaded(posterior, tmp_path)
    assert same(posterior, again)
    dependencies = [getattr(each.guide.auto, "dependencies", None) for each in (posterior, again)]  # type: ignore[union-attr]
    assert dependencies[0] == dependencies[1] != "linear"
    with pytest.raises(GuideError, match="cannot be a prior: its posterior is not a Normal"):
        posterior.update(tiny_examples(8, seed=3))


def test_points_are_saved_but_neither_they_nor_extra_latents_are_a_joint_prior(
    tmp_path: Path,
) -> None:
    for family in ("AutoDelta", "AutoLaplaceApproximation"):
        posterior = fitted(family, {})
        assert same(posterior, loaded(posterior, tmp_path / family))
        with pytest.raises(
            GuideError, match=f"{family} cannot be a prior: its posterior is not a Normal"
        ):
            posterior.as_prior()
    wide = fitted("mvn", {}, tiny_model((), prior=hierarchical))
    with pytest.raises(
        GuideError, match="AutoMultivariateNormal cannot be a prior: it also covers tau"
    ):
        wide.as_prior()
    scaled = fitted("AutoNormal", {}, tiny_model((), prior=hierarchical))
    assert scaled.update(tiny_examples(8, seed=3), **QUICK).report.steps == 2


class Own(pyro_guides.AutoNormal):
    pass


def test_what_plain_data_cannot_make_again_says_what_to_do(tmp_path: Path) -> None:
    flow = {"init_transform_fn": lambda size: dist.transforms.affine_autoregressive(size)}
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (Own, {}, r"Own is not one of Pyro's own.*state_dict"),
        (pyro_guides.AutoNormalizingFlow, flow, r"guides\.0\.options\.init_transform_fn"),
    ]
    for number, (family, options, message) in enumerate(cases):
        posterior = fitted(family, options)
        with pytest.raises(SaveError, match=message):
            posterior.save(tmp_path / str(number))
        assert not (tmp_path / str(number)).exists()


@pytest.mark.parametrize("name", ["AutoNormal", AutoNormal])
def test_they_start_at_the_sites_own_start(name: Any) -> None:
    """B at 0 and A away from it: all at Pyro's median would be a saddle of the product."""
    model = tiny_model()
    guide = bh.autoguide(name, model)
    assert isinstance(guide, PyroGuide) and isinstance(guide.auto, AutoNormal)
    means = {site: mean[None] for site, mean in guide.means().items()}
    for site, value in model.network.coordinates(means).items():
        assert bool(value.any()) == site.endswith(".A"), site


@pytest.mark.parametrize("name", [n for n in PYROS if n != "AutoNormalizingFlow"])
def test_all_of_them_fit_under_a_mixture_of_distributions(name: str) -> None:
    def spike_and_slab(site: Site) -> TorchDistribution:
        sds = torch.tensor([0.05, 1.0]).expand(*site.shape, 2)
        weights = torch.tensor([0.9, 0.1]).expand(*site.shape, 2)
        return dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(0 * sds, sds))

    posterior = fitted(name, {}, tiny_model((), prior={"*": spike_and_slab}))
    assert posterior.predict(["w5 w6"], samples=3).probabilities.isfinite().all()


def evaluated(posterior: bh.Posterior, batch: bh.data.Batch) -> None:
    svi = SVI(posterior.model, posterior.guide, pyro.optim.Adam({}), Trace_ELBO())
    svi.evaluate_loss(batch)  # type: ignore[no-untyped-call]


USES: dict[str, Callable[[bh.Posterior, bh.data.Batch], Any]] = {
    "Predictive": lambda p, batch: Predictive(p.model, guide=p.guide, num_samples=2)(batch),
    "trace": lambda p, batch: poutine.trace(p.guide).get_trace(batch),
    "SVI": evaluated,
}


@pytest.mark.parametrize("name", [n for n in PYROS if n != "AutoNormalizingFlow"])
def test_pyro_s_inference_on_one_posterior_leaves_another_as_it_is(name: str) -> None:
    """Their parameters have the same names, and Pyro's store is global."""
    posteriors = [
        bh.fit(tiny_model(()), name, tiny_examples(16, seed=seed), **QUICK, lr=0.05, seed=seed)
        for seed in (0, 1)
    ]

    def answers() -> list[Tensor]:
        return [p.predict(tiny_examples(5), 4).probabilities for p in posteriors]

    before = answers()
    assert not torch.equal(*before)
    for use in USES.values():
        for posterior in posteriors:
            use(posterior, tiny_batch(8))
        assert all(map(torch.equal, before, answers()))
        assert not list(pyro.get_param_store())


@pytest.mark.parametrize(
    "name", ["AutoNormal", "AutoDelta", "structured", "AutoMultivariateNormal"]
)
def test_latents_that_collide_as_attributes_are_named(name: str) -> None:
    fit = {"max_steps": 2, "progress": False}
    bh.fit(tiny_model((), prior=with_scales_named("scale.{}")), name, tiny_examples(), **fit)
    within = tiny_model((), prior=with_scales_named("{}.scale"))
    if name == "AutoMultivariateNormal":  # which keeps one vector
        bh.fit(within, name, tiny_examples(), **fit)
        return
    collide = r"prior samples 'head.weight' and 'head.weight.scale'.*rename.*'scale.head.weight'"
    with pytest.raises(GuideError, match=collide):
        bh.autoguide(name, within)
