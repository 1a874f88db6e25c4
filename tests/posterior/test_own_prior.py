"""Rounds after a first prior of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import hierarchical, independent
from saves import load

import bhpeft_pyro as bh
from bhpeft_pyro.errors import GuideError, PriorError
from bhpeft_pyro.guides import PriorGuide
from bhpeft_pyro.testing import tiny_examples, tiny_model

QUICK: dict[str, Any] = {"max_steps": 8, "progress": False}


@pytest.fixture(scope="module")
def first() -> bh.Posterior:
    return bh.fit(tiny_model(()), "normal", tiny_examples(24), **QUICK)


def with_factor(sites: Any) -> dict[str, torch.Tensor]:
    values = {
        site.name: pyro.sample(
            site.name, dist.Normal(0.0, site.unit).expand(site.shape).to_event(site.ndim)
        )
        for site in sites
    }
    pyro.factor("knowledge", dist.Normal(3.0, 0.1).log_prob(values["head.bias"]).sum(-1))
    return values


def scaled(sites: Any) -> dict[str, torch.Tensor]:
    with pyro.poutine.scale(scale=100.0):
        return {
            site.name: pyro.sample(
                site.name, dist.Normal(0.0, site.unit).expand(site.shape).to_event(site.ndim)
            )
            for site in sites
        }


fixed = {"head.bias": torch.tensor([5.0, -5.0])}


@pytest.mark.parametrize(
    ("prior", "at"),
    [
        (with_factor, "knowledge"),
        (scaled, "head.weight"),
        (pyro.poutine.condition(hierarchical, fixed), "head.bias"),  # says that tau is large
    ],
)
def test_evidence_in_the_first_prior_is_refused_where_it_would_be_left_out(
    prior: Any, at: str
) -> None:
    """Its Normals are not the prior, nor are draws of them."""
    posterior = bh.fit(tiny_model((), prior=prior), "normal", tiny_examples(24), **QUICK)
    lost = f"observations, factors, scales or masks at {at}.*which would be left out"
    with pytest.raises(PriorError, match=lost):
        posterior.update(tiny_examples(9, seed=3), keep=0.5, **QUICK)
    with pytest.raises(PriorError, match=lost):
        PriorGuide(posterior.model)
    with pytest.warns(UserWarning, match=f"{lost}; the groups of the prior are left out"):
        exported = posterior.to_arviz(tiny_examples(5), samples=4)
    assert "posterior" in exported and "posterior_predictive" in exported
    assert "prior" not in exported and "prior_predictive" not in exported
    later = posterior.update(tiny_examples(9, seed=3), **QUICK)  # whose prior has none
    assert "prior_predictive" in later.to_arviz(tiny_examples(5), samples=4)


def test_a_site_that_is_held_fixed_says_nothing_about_independent_ones() -> None:
    model = tiny_model((), prior=pyro.poutine.condition(independent, fixed))
    assert torch.equal(PriorGuide(model)()["head.bias"], fixed["head.bias"])


def test_a_callback_sees_every_step_and_changes_nothing(first: bh.Posterior) -> None:
    seen: list[dict[str, float]] = []

    def note(record: dict[str, float]) -> None:
        seen.append({**record})
        record.clear()

    examples = tiny_examples(24)
    fitted = bh.fit(tiny_model(()), "delta", examples, components=2, callback=note, **QUICK)
    assert [each["component"] for each in seen] == [0] * 8 + [1] * 8
    histories = [entry for part in fitted.components for entry in part.report.history]
    assert [{k: v for k, v in each.items() if k != "component"} for each in seen] == histories
    seen.clear()
    first.update(tiny_examples(9, seed=3), callback=note, **QUICK)
    assert len(seen) == 8


def test_sites_that_depend_on_each_other_are_refused() -> None:
    def prior(sites: Any) -> dict[str, torch.Tensor]:
        values: dict[str, torch.Tensor] = {}
        for site in sites:
            loc = values["head.weight"][..., 0] if values else torch.zeros(site.shape)
            normal = dist.Normal(loc, 0.1).expand(site.shape).to_event(site.ndim)
            values[site.name] = pyro.sample(site.name, normal)
        return values

    model = bh.Model(tiny_model(()).network, prior)
    with pytest.raises(GuideError, match=r"'head.bias' depends on what else the prior samples"):
        bh.fit(model, "laplace", tiny_examples(), **QUICK)
    posterior = bh.fit(model, "normal", tiny_examples(), **QUICK)
    with pytest.raises(PriorError, match=r"'head.bias' depends on what else"):
        posterior.update(tiny_examples(9, seed=3), keep=0.5, **QUICK)


def test_a_prior_may_sample_the_sites_in_any_order(tmp_path: Path) -> None:
    def own(sites: Any) -> dict[str, torch.Tensor]:
        return {s.name: pyro.sample(s.name, wide(s)) for s in sites}

    def backwards(sites: Any) -> dict[str, torch.Tensor]:
        return own(sites[::-1])

    def wide(site: Any) -> Any:
        sd = 0.5 if site.name.startswith("head") else 0.05
        return dist.Normal(0.0, sd).expand(site.shape).to_event(len(site.shape))

    model = tiny_model(bh.presets.lora(rank=1))
    first = bh.fit(model, "laplace", tiny_examples(24), components=1, **QUICK)
    found = [
        bh.fit(model.with_prior(p), "laplace", tiny_examples(9, seed=3), components=1, **QUICK)
        for p in (own, backwards)
    ]
    one, other = (each.guide.scales() for each in found)
    assert [*one] == [*other] == [site.name for site in model.sites]
    for name, sd in one.items():
        torch.testing.assert_close(other[name], sd, rtol=1e-3, atol=0.0)
    one, other = (each.predict(["w5 w9", "w6"]).probabilities for each in found)
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    found[1].save(tmp_path)
    again = load(tmp_path, prior=backwards)
    assert again.evaluate(tiny_examples(9)) == found[1].evaluate(tiny_examples(9))
    with pytest.raises(GuideError, match="sites in another order"):
        first.guide.set_prior(model.with_prior(_turned(first.as_prior())))


def _turned(prior: Any) -> Any:
    shapes = dict(reversed(prior.shapes.items()))
    return type(prior)(prior.normal, shapes, prior.name)


def test_a_round_goes_on_with_its_tau() -> None:
    first = bh.fit(tiny_model(()), "laplace", tiny_examples(24), components=1, tau=7.0, **QUICK)
    again = first.update(tiny_examples(9, seed=3), tau=None, **QUICK)
    assert again.report.tau == 7.0
