"""Priors that are written for one draw, and run once for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from pyro.infer.reparam import LocScaleReparam
from torch import Tensor

import bhpeft_pyro as bh
from bhpeft_pyro.errors import PriorError
from bhpeft_pyro.guides import PriorGuide
from bhpeft_pyro.peft.sites import Site
from bhpeft_pyro.prediction.draws import draw
from bhpeft_pyro.priors import checked
from bhpeft_pyro.testing import tiny_batch, tiny_examples, tiny_model
from bhpeft_pyro.training.elbo import ELBO

Sites = Sequence[Site]
QUICK: dict[str, Any] = {"max_steps": 2, "progress": False}


def normal(site: Site, sd: Tensor | float) -> Tensor:
    fn = dist.Normal(0.0, sd * site.unit).expand(site.shape).to_event()
    return pyro.sample(site.name, fn)


def one_scale(sites: Sites) -> Mapping[str, Tensor]:
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    return {site.name: normal(site, tau) for site in sites}


def by_layer(sites: Sites) -> Mapping[str, Tensor]:
    values = {}
    for site in sites:
        fn = dist.LogNormal(torch.zeros(site.shape[0]), 0.5).to_event(1)
        scale = pyro.sample(f"scale.{site.name}", fn)
        values[site.name] = normal(site, scale.reshape(-1, *[1] * (site.ndim - 1)))
    return values


def reparametrised(sites: Sites) -> Mapping[str, Tensor]:
    with poutine.reparam(config={"lora.query.B": LocScaleReparam(0.0)}):
        return one_scale(sites)


def other_families(sites: Sites) -> Mapping[str, Tensor]:
    shares = pyro.sample("shares", dist.Dirichlet(torch.ones(2)))
    rate = pyro.sample("rate", dist.Gamma(2.0, 1 + shares[0]))
    values = {}
    for site in sites:
        tail = dist.StudentT(4.0, 0.0, rate * site.unit).expand(site.shape).to_event()
        values[site.name] = pyro.sample(site.name, tail)
    joint = dist.MultivariateNormal(torch.zeros(2), scale_tril=torch.eye(2) * rate)
    pyro.sample("joint", joint)
    pyro.sample("seen", dist.Normal(values["head.bias"].sum(), rate), obs=torch.tensor(0.5))
    with poutine.scale(scale=torch.tensor(3.0)):
        pyro.factor("near zero", -values["head.bias"].square().sum())
    pyro.deterministic("double", 2 * rate)
    return values


def handled_by_values(sites: Sites) -> Mapping[str, Tensor]:
    values = one_scale(sites)
    bias, tau = values["head.bias"], values["head.bias"].sum().exp()
    with poutine.mask(mask=bias[0] > 0):
        pyro.sample("seen", dist.Normal(bias[1], tau), obs=torch.tensor(0.5))
        with poutine.scale(scale=tau):
            pyro.factor("near zero", -bias.square().sum())
    return values


def branching(sites: Sites) -> Mapping[str, Tensor]:
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    return {site.name: normal(site, 2.0 if tau > 1 else 0.5) for site in sites}


def plated(sites: Sites) -> Mapping[str, Tensor]:
    with pyro.plate("layers", 2), pyro.plate("draws", 3, dim=-2):  # a name and a dim of fits
        scales = pyro.sample("scales", dist.LogNormal(0.0, 1.0))
    return {site.name: normal(site, scales[2, 1]) for site in sites}


def without_events(sites: Sites) -> Mapping[str, Tensor]:
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    return {s.name: pyro.sample(s.name, dist.Normal(0.0, tau).expand(s.shape)) for s in sites}


PRIORS = {
    f.__name__: f
    for f in (
        one_scale,
        by_layer,
        reparametrised,
        other_families,
        handled_by_values,
        branching,
        plated,
        without_events,
    )
}


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("lead", [(5, 1), (3,)])
def test_each_draw_has_the_density_and_gradient_that_it_has_alone(
    name: str, lead: tuple[int, ...]
) -> None:
    prior, sites = PRIORS[name], tiny_model().sites
    with pyro.plate("draws", lead[0], dim=-len(lead)):
        trace = poutine.trace(checked).get_trace(prior, sites)
    latents = {
        name: node["value"].detach().requires_grad_()
        for name, node in trace.iter_stochastic_nodes()
    }

    def density(call: Callable[..., Any], data: dict[str, Tensor]) -> poutine.Trace:
        found = poutine.trace(poutine.condition(call, data=data)).get_trace(prior, sites)
        found.compute_log_prob()
        return found

    with pyro.plate("draws", lead[0], dim=-len(lead)):
        together = density(checked, latents)
    total = together.log_prob_sum()
    gradients = torch.autograd.grad(total, list(latents.values()))
    alone = []
    for number in range(lead[0]):
        own = {key: value.flatten(0, len(lead) - 1)[number] for key, value in latents.items()}
        alone.append(density(lambda prior, sites: prior(sites), own))
    for key, node in together.nodes.items():
        if node["type"] == "sample" and key != "draws":
            expected = torch.stack([each.nodes[key]["log_prob"].sum() for each in alone])
            torch.testing.assert_close(node["log_prob"].reshape(-1), expected)
            value = torch.stack([each.nodes[key]["value"] for each in alone])
            torch.testing.assert_close(
                node["value"].expand(*lead, *value.shape[1:]).flatten(0, len(lead) - 1), value
            )
    expected = torch.autograd.grad(
        sum(each.log_prob_sum() for each in alone), list(latents.values())
    )
    torch.testing.assert_close(gradients, expected)


def test_draws_differ_and_follow_their_own_scale() -> None:
    """With seven rows in a dim and seven draws, no draw may get the scale of another."""
    site = bh.Head(7).sites(400)[0]
    with pyro.plate("draws", 7, dim=-2):
        trace = poutine.trace(checked).get_trace(one_scale, [site])
    tau, value = trace.nodes["tau"]["value"], trace.nodes[site.name]["value"] / site.unit
    assert tau.unique().numel() == 7
    torch.testing.assert_close(value.std((-1, -2)), tau, rtol=0.1, atol=0)


@pytest.mark.parametrize("name", ["by_layer", "other_families", "handled_by_values", "plated"])
def test_a_fit_with_several_particles(name: str) -> None:
    model = tiny_model(prior=PRIORS[name])
    posterior = bh.fit(model, "normal", tiny_examples(12), particles=4, **QUICK)
    assert posterior.sample(3)["lora.query.B"].shape == (3, 2, 16, 2)
    again = posterior.update(tiny_examples(8, seed=1))
    assert again.predict(["w5 w20"], samples=3).probabilities.isfinite().all()


def test_the_kl_of_weights_given_a_random_scale_stays_in_closed_form() -> None:
    """The loss of a guide that does not depend on tau is the same whatever weights it draws."""
    model = tiny_model(prior=one_scale)

    def guide(batch: object) -> None:
        pyro.sample("tau", dist.Delta(torch.tensor(0.5)))
        for site in model.sites:
            zero = torch.zeros(site.shape)
            pyro.sample(site.name, dist.Normal(zero, 0.1 * site.unit).to_event())

    elbo, kls = ELBO(num_particles=3), []
    for _ in range(2):
        elbo.loss(model, guide, tiny_batch(6).split(3))
        assert elbo.parts is not None
        kls.append(elbo.parts.kl["lora.query.B"])
    assert torch.equal(*kls)


@pytest.mark.parametrize(("name", "shape"), [("normal", (3, 2)), ("AutoNormal", (3, 2))])
def test_plates_stay_within_a_draw(name: str, shape: tuple[int, ...]) -> None:
    model = tiny_model((), prior=plated)
    posterior = bh.fit(model, name, tiny_examples(12), particles=4, **QUICK)
    assert posterior.sample(5)["scales"].shape == (5, *shape)
    values = {"scales": torch.full(shape, 2.0)} | {s.name: torch.ones(s.shape) for s in model.sites}
    alone = poutine.trace(poutine.condition(model, values)).get_trace(None)
    many = {name: value.expand(6, 1, *value.shape) for name, value in values.items()}
    together = poutine.trace(poutine.condition(model, many)).get_trace(None)
    torch.testing.assert_close(together.log_prob_sum(), 6 * alone.log_prob_sum())
    expected = dist.LogNormal(0.0, 1.0).log_prob(values["scales"]).sum()
    alone.compute_log_prob()
    torch.testing.assert_close(alone.nodes["scales"]["log_prob"], expected)


def test_draws_that_sample_other_variables_are_refused() -> None:
    def odd(sites: Sites) -> Mapping[str, Tensor]:
        tau = pyro.sample("tau", dist.HalfCauchy(1.0))
        if tau > 1:
            pyro.sample("more", dist.Normal(0.0, 1.0))
        return {site.name: normal(site, tau) for site in sites}

    with pyro.plate("draws", 40, dim=-2), pytest.raises(PriorError, match="sample 'more', others"):
        checked(odd, bh.Head(2).sites(4))


class OwnHierarchical(bh.priors.Hierarchical):
    def sample(self, site: Site) -> Tensor:
        return normal(site, pyro.sample(f"{site.name}.tau", dist.HalfNormal(1.0)))


@pytest.mark.parametrize(
    "prior",
    [
        {"*": lambda site: dist.Normal(0.0, pyro.sample(f"{site.name}.tau", dist.HalfNormal(1.0)))},
        OwnHierarchical(),
    ],
    ids=["by site", "subclass"],
)
def test_parts_of_ready_priors_are_written_for_one_draw_too(prior: Any) -> None:
    model = tiny_model((), prior=prior)
    drawn = draw(model, PriorGuide(model), 5)
    assert drawn["head.weight"].shape == (5, 1, 2, 16)


def scale_first(sites: Sites) -> Mapping[str, Tensor]:
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    return {site.name: normal(site, tau) for site in sites}


def scale_last(sites: Sites) -> Mapping[str, Tensor]:
    values = {site.name: normal(site, 1.0) for site in sites}
    pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    return values


def scale_between(sites: Sites) -> Mapping[str, Tensor]:
    first, *others = sites
    values = {first.name: normal(first, 1.0)}
    tau = pyro.sample("tau", dist.LogNormal(values[first.name].mean(), 1.0))
    return values | {site.name: normal(site, tau) for site in others}


@pytest.mark.parametrize(
    ("guide", "prior"),
    [("normal", scale_first), ("AutoNormal", scale_last), ("AutoNormal", scale_between)],
)
def test_predictive_in_parallel_is_predictive_in_turn(guide: str, prior: Any) -> None:
    """It gives a scalar the dims of the model's plates, and weights, which have dims, none."""
    model = tiny_model(prior=prior)
    batch = replace(tiny_batch(8), labels=None)
    pyro.set_rng_seed(0)
    drawn = Predictive(bh.autoguide(guide, model), num_samples=300)(batch)
    wide = {name: value + 3 * torch.randn_like(value) for name, value in drawn.items()}
    drawn = wide | {"tau": drawn["tau"]}
    shares = [
        Predictive(model, drawn, parallel=parallel)(batch)["label"].float().mean(0)
        for parallel in (True, False)
    ]
    assert shares[0].shape == (8,) and 0.1 < shares[0].mean() < 0.9
    torch.testing.assert_close(*shares, atol=0.1, rtol=0)
    whole = Predictive(model, guide=bh.autoguide(guide, model), num_samples=7, parallel=True)(batch)
    assert whole["label"].shape == (7, 8)
