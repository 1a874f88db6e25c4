"""Later rounds' priors on disk: what their latents are transformed by, and whose prior they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from saves import load
from torch import Tensor

import bhpeft_pyro as bh
from bhpeft_pyro.base.distributions import Constrained
from bhpeft_pyro.errors import PriorError, SaveError
from bhpeft_pyro.model.likelihoods import Likelihood, Normal
from bhpeft_pyro.peft.sites import Site
from bhpeft_pyro.priors import PosteriorPrior, Prior
from bhpeft_pyro.testing import tiny_examples, tiny_model

DATA, MORE = tiny_examples(), tiny_examples(seed=1)
RATINGS = {"text": ["w5 w9", "w6 w8 w30", "w5", "w6 w12"], "label": [0.5, 1.5, -2.0, 1.0]}
QUICK: dict[str, Any] = {"max_steps": 3, "progress": False}


def two_rounds(prior: Any, guide: str = "normal") -> bh.Posterior:
    first = bh.fit(tiny_model((), prior=prior), guide, DATA, **QUICK)
    return first.update(MORE, **QUICK)


def reload(posterior: bh.Posterior, folder: Path, prior: Any = None) -> bh.Posterior:
    return load(posterior.save(folder), prior=prior)


def log_density(prior: Prior, sites: Sequence[Site], values: dict[str, Tensor]) -> float:
    """Of one draw, latents that are no sites included."""
    trace = poutine.trace(poutine.condition(prior, values)).get_trace(sites)
    return float(trace.log_prob_sum())


def assert_same(one: bh.Posterior, other: bh.Posterior) -> None:
    draws, again = one.sample(5), other.sample(5)
    assert draws.keys() == again.keys()
    for name, value in draws.items():
        assert torch.equal(value, again[name]), name
    predicted = [each.predict(MORE, 7).probabilities for each in (one, other)]  # type: ignore[union-attr]
    assert torch.equal(*predicted)
    values = {name: value[0] for name, value in draws.items()}
    densities = [log_density(each.model.prior, one.model.sites, values) for each in (one, other)]
    assert densities[0] == densities[1]


def made_of_latents(sites: Sequence[Site]) -> dict[str, Tensor]:
    """Every support that a guide transforms a Normal to, of scalars and vectors."""
    tau = pyro.sample("tau", dist.LogNormal(-2.0, 0.3))
    pyro.sample("widths", dist.HalfNormal(torch.ones(3)).to_event(1))
    pyro.sample("share", dist.Beta(2.0, 5.0))
    pyro.sample("bounded", dist.Uniform(-1.0, torch.tensor([4.0, 5.0])).to_event(1))
    pyro.sample("mix", dist.Dirichlet(torch.ones(4)))
    values = {}
    for s in sites:
        z = pyro.sample(f"z.{s.name}", dist.Normal(0.0, 1.0).expand(s.shape).to_event(s.ndim))
        made = tau.reshape(*tau.shape, *[1] * s.ndim) * z
        values[s.name] = pyro.deterministic(s.name, made, event_dim=s.ndim)
    return values


@pytest.mark.parametrize("guide", ["normal", "AutoNormal"])
def test_constrained_latents_of_a_second_round_come_back(guide: str, tmp_path: Path) -> None:
    """A LogNormal came back as its Normal in log space, and its guide took real values for it."""
    second = two_rounds(made_of_latents, guide)
    again = reload(second, tmp_path / "2", made_of_latents)
    assert (again.sample(50)["tau"] > 0).all()
    assert_same(second, again)
    third, other = (each.update(DATA, again=True, **QUICK) for each in (second, again))
    assert third.report.history == other.report.history


def by_feature(sites: Sequence[Site]) -> dict[str, Tensor]:
    """A vector of scales for each site, which is sampled itself."""
    values = {}
    for s in sites:
        scale = pyro.sample(
            f"scale.{s.name}", dist.LogNormal(0.0, 0.5).expand(s.shape[-1:]).to_event(1)
        )
        scale = scale.reshape(*scale.shape[:-1], *[1] * (s.ndim - 1), s.shape[-1])
        normal = dist.Normal(0.0, scale.expand(*scale.shape[: -s.ndim], *s.shape))
        values[s.name] = pyro.sample(s.name, normal.to_event(s.ndim))
    return values


def test_the_first_prior_never_stands_for_a_later_one(tmp_path: Path) -> None:
    """With a vector latent the prior given to `load` became that of the second round."""
    second = two_rounds(by_feature)
    again = reload(second, tmp_path / "given", by_feature)
    assert isinstance(again.model.prior, PosteriorPrior)
    assert again.first_priors[0] is by_feature
    assert_same(second, again)
    without = reload(second, tmp_path / "not given")  # needed for forgetting only
    assert isinstance(without.model.prior, PosteriorPrior) and without.first_priors == (None,)
    assert_same(second, without)


def test_a_constrained_site_is_not_forgotten(tmp_path: Path) -> None:
    prior = {"head.bias": dist.LogNormal(0.0, 1.0), "*": dist.Normal(0.0, 1.0)}
    again = reload(two_rounds(prior), tmp_path / "2", prior)
    with pytest.raises(PriorError, match=r"'head.bias' is LogNormal .*Normal"):
        again.update(DATA, keep=0.5, again=True)


def test_a_constrained_scalar_is_not_forgotten_in_log_space() -> None:
    """The Normal inside a LogNormal was taken for the distribution itself."""
    likelihood: Likelihood = Normal()
    prior = {"noise.*": dist.LogNormal(0.0, 1.0), "*": dist.Normal(0.0, 1.0)}
    model = tiny_model((), 1, prior, likelihood)
    posterior = bh.fit(model, "normal", RATINGS, **QUICK)
    with pytest.raises(PriorError, match=r"'noise.log_scale' is .*expected Normal"):
        posterior.update(RATINGS, keep=0.5, again=True)


@pytest.mark.parametrize("guide", ["normal", "AutoNormal"])
def test_a_new_family_keeps_to_the_supports(guide: str) -> None:
    """Of a transformed Normal torch says that it is real: a guide made for it went below 0."""
    first = bh.fit(tiny_model((), prior=made_of_latents), "normal", DATA, **QUICK)
    draws = bh.fit(first.model.with_prior(first.as_prior()), guide, MORE, **QUICK).sample(50)
    assert (draws["tau"] > 0).all() and (draws["widths"] > 0).all()
    assert ((draws["bounded"] > -1) & (draws["bounded"] < 5)).all()


def test_a_latent_that_cannot_be_described_is_refused_by_name(tmp_path: Path) -> None:
    first = bh.fit(tiny_model((), prior={"*": dist.Normal(0.0, 1.0)}), "normal", DATA, **QUICK)
    cases = {
        "LogNormal": dist.LogNormal(torch.zeros(2), 1.0).to_event(1),
        "Laplace": dist.Laplace(torch.zeros(2), 1.0),
        "_SoftplusPositive": Constrained(
            dist.Normal(torch.zeros(2), 1.0).to_event(1), dist.constraints.softplus_positive
        ),
    }
    for name, latent in cases.items():
        prior = PosteriorPrior({"head.bias": latent})
        model = bh.Model(first.model.network, prior)
        with pytest.raises(SaveError, match=rf"priors\.0\.distributions\.head\.bias.*{name}"):
            first.replace(model=model, priors=(prior,)).save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@dataclass
class Wide:
    """A prior with an option."""

    sd: float = 1.0

    def __call__(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        return {
            s.name: pyro.sample(s.name, dist.Normal(0.0, self.sd).expand(s.shape).to_event())
            for s in sites
        }


def test_a_prior_of_ones_own_must_have_its_options_again(tmp_path: Path) -> None:
    fitted = bh.fit(tiny_model((), prior=Wide(0.05)), "normal", DATA, **QUICK)
    again = reload(fitted, tmp_path / "run", Wide(0.05))
    assert again.model.prior == Wide(0.05)
    with pytest.raises(SaveError, match=r"prior: .*sd=0\.05.*; got .*sd=1\.0"):
        load(tmp_path / "run", prior=Wide())


def plain_normal(sites: Sequence[Site]) -> dict[str, Tensor]:
    return Wide()(sites)


def test_a_site_is_held_fixed_at_the_same_values_again(tmp_path: Path) -> None:
    """In later rounds too, which compute the site from it."""

    def held(bias: float) -> Any:
        return poutine.condition(plain_normal, {"head.bias": torch.tensor([bias, -bias])})

    later = two_rounds(held(3.0))
    first = bh.fit(tiny_model((), prior=held(3.0)), "normal", DATA, **QUICK)
    for number, posterior in enumerate([first, later]):
        folder = tmp_path / str(number)
        assert_same(posterior, reload(posterior, folder, held(3.0)))
        other = r"'head.bias' held fixed at \[3.0, -3.0\]; got \[2.0, -2.0\]"
        with pytest.raises(SaveError, match=other):
            load(folder, prior=held(2.0))
    with pytest.raises(SaveError, match=r"'head.bias' held fixed at .*; got None"):
        load(tmp_path / "0", prior=plain_normal)


def chained(sites: Sequence[Site]) -> dict[str, Tensor]:
    """Cut-offs in order, and a Cholesky factor, that set the scales."""
    factor = pyro.sample("factor", dist.LKJCholesky(3, 1.0))
    ordered = dist.transforms.OrderedTransform()
    cuts = pyro.sample(
        "cuts",
        dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), [ordered]),
    )
    scale = 1 + factor[1, 0].abs() + (cuts[1] - cuts[0]).clamp_max(1.0)
    return {
        s.name: pyro.sample(s.name, dist.Normal(0.0, scale).expand(s.shape).to_event())
        for s in sites
    }


def test_ordered_and_cholesky_latents_come_back(tmp_path: Path) -> None:
    second = two_rounds(chained)
    again = reload(second, tmp_path / "run", chained)
    assert torch.equal(again.predict(["w5"]).probabilities, second.predict(["w5"]).probabilities)


def test_a_computed_site_is_not_held_fixed(tmp_path: Path) -> None:
    """A soft threshold is often at 0, in some draws and not in others."""

    def thresholded(sites: Sequence[Site]) -> dict[str, Tensor]:
        values = plain_normal([site for site in sites if site.name != "head.bias"])
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        bias = torch.relu(z.abs() - 1.5) * z.sign()
        return values | {"head.bias": pyro.deterministic("head.bias", bias)}

    posterior = bh.fit(tiny_model((), prior=thresholded), "normal", DATA, **QUICK)
    for seed in range(3):
        torch.manual_seed(seed)
        assert_same(posterior, reload(posterior, tmp_path / str(seed), thresholded))
