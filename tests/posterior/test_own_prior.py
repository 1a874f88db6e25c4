"""Rounds under a prior of one's own, and with a guide of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import hierarchical, independent
from guide_functions import around
from saves import load

import bhpeft_pyro as bh
from bhpeft_pyro.errors import ConfigError, GuideError, PriorError
from bhpeft_pyro.guides import PriorGuide
from bhpeft_pyro.guides.latent import latents
from bhpeft_pyro.testing import tiny_examples, tiny_model

QUICK: dict[str, Any] = {"max_steps": 8, "progress": False}


def robust(posterior: bh.Posterior) -> dict[str, Any]:
    """0.9 the old posterior + 0.1 the wide, weight by weight."""
    old = posterior.as_prior().distributions  # type: ignore[attr-defined]

    def mixture(site: Any) -> Any:
        loc, sd = old[site.name].mean, old[site.name].stddev
        parts = dist.Normal(
            torch.stack([loc, 0 * loc], -1), torch.stack([sd, 0 * sd + site.unit], -1)
        )
        weights = torch.tensor([0.9, 0.1]).expand(*site.shape, 2)
        return dist.MixtureSameFamily(dist.Categorical(weights), parts)

    return {"*": mixture}


@pytest.fixture(scope="module")
def first() -> bh.Posterior:
    return bh.fit(tiny_model(()), "normal", tiny_examples(24), **QUICK)


def test_a_robust_mixture_is_the_next_prior(first: bh.Posterior, tmp_path: Path) -> None:
    prior = robust(first)
    second = first.update(tiny_examples(9, seed=3), prior=prior, **QUICK)
    assert [report.id for report in second.lineage[:-1]] == [first.report.id]
    assert second.report.parent == first.report.id
    site = first.model.sites[0]
    density = prior["*"](site).log_prob(torch.zeros(site.shape)).sum()
    found = second.model.prior.patterns["*"](site).log_prob(torch.zeros(site.shape)).sum()  # type: ignore[attr-defined]
    assert density == found
    third = second.update(tiny_examples(9, seed=4), **QUICK)  # its own posterior again
    history = bh.streams.History(tmp_path)
    for each in (first, second, third):
        history.add(each)
    again = load(tmp_path / second.report.id, prior=prior)
    assert again.evaluate(tiny_examples(9)) == second.evaluate(tiny_examples(9))


def test_a_prior_with_latents_that_the_guide_lacks_needs_a_guide(first: bh.Posterior) -> None:
    data, prior = tiny_examples(9, seed=3), bh.priors.Hierarchical()
    with pytest.raises(GuideError, match=r"log_scale.*in an update with prior=, give guide= too"):
        first.update(data, prior=prior, **QUICK)
    under = first.update(data, prior=prior, guide="normal", **QUICK)
    assert "head.weight.log_scale" in under.guide.means()


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


def test_a_mixture_of_real_parts_is_real(first: bh.Posterior) -> None:
    """Its sd is known then, from which guides start and to which reports compare."""
    prior = robust(first)
    model = first.model.with_prior(prior)
    for latent, site in zip(latents(model), model.sites, strict=True):
        torch.testing.assert_close(latent.scale, prior["*"](site).stddev)
    second = first.update(tiny_examples(9, seed=3), prior=prior, **QUICK)
    assert isinstance(
        second.as_prior().distributions["head.bias"].base_dist,  # type: ignore[attr-defined]
        dist.Normal,
    )


def test_what_makes_no_sense_beside_a_prior(first: bh.Posterior) -> None:
    data, wide = tiny_examples(9, seed=3), dist.Normal(0.0, 1.0)
    with pytest.raises(ConfigError, match="prior: expected no keep"):
        first.update(data, prior=wide, keep=0.5, **QUICK)
    with pytest.raises(PriorError, match=r"no tensor for the site 'head.weight'"):
        first.update(data, prior=lambda sites: {}, **QUICK)


@pytest.mark.parametrize("guide", [None, "laplace", "mvn"])
def test_another_family_under_a_prior_of_one_s_own(first: bh.Posterior, guide: Any) -> None:
    prior = bh.priors.FunctionSpaceNormal(change=0.2, head=0.5)
    second = first.update(tiny_examples(9, seed=3), prior=prior, guide=guide, **QUICK)
    assert second.model.prior is prior or guide == "laplace"
    assert len(second.lineage) == 2


def test_a_guide_function_in_rounds() -> None:
    model = tiny_model(())
    first = bh.fit(model, around(model), tiny_examples(24), **QUICK)
    with pytest.raises(GuideError, match=r"FunctionGuide does not say.*update\(\.\.\., prior="):
        first.update(tiny_examples(9, seed=3), **QUICK)
    prior = bh.Posterior.from_draws(model, first.sample(200)).as_prior()
    second = first.update(tiny_examples(9, seed=3), prior=prior, **QUICK)
    before, after = (each.guide.state_dict() for each in (first, second))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert second.report.parent == first.report.id


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


def test_the_width_of_laplace_is_that_of_a_fit_under_the_new_prior() -> None:
    """Whatever the first prior was: its precision is in the covariance no longer."""
    old = bh.fit(tiny_model(()), "laplace", tiny_examples(24), components=1, **QUICK)
    data, narrow = tiny_examples(24, seed=3), dist.Normal(0.0, 0.01)
    later = old.update(data, prior=narrow, tau=4.0, **QUICK)
    sds = later.guide.covariance.variance.sqrt()  # type: ignore[union-attr]
    assert sds.max() <= 0.0051  # 0.01 / sqrt(tau), where data say nothing more
    wide = old.update(tiny_examples(80, seed=3), prior=dist.Normal(0.0, 2.0), **QUICK)
    assert wide.report.negative_elbo < 1e3


def test_a_prior_with_scales_can_be_forgotten_in_part() -> None:
    """Sites that it computes from its scales still are, in the round after."""
    first = bh.fit(tiny_model(), "normal", tiny_examples(24), **QUICK)
    prior = bh.priors.Hierarchical()
    second = first.update(tiny_examples(24, seed=3), guide="normal", prior=prior, **QUICK)
    third = second.update(tiny_examples(24, seed=4), keep={"head.bias": 0.5}, **QUICK)
    assert third.predict(["w5 w7"], samples=3).probabilities.isfinite().all()


def carried(last: bh.Posterior, data: Any, tau: float, **more: Any) -> torch.Tensor:
    """The sds that a round passes on, which do not depend on the tau of its predictions."""
    new = last.update(data, tau=tau, **QUICK, **more)
    return new.as_prior().normal.stddev  # type: ignore[attr-defined]


@pytest.mark.parametrize("guide", [None, "laplace"])
def test_random_projections_are_not_pulled_to_zero(guide: Any) -> None:
    """As in `fit`: an own prior is centred where LoRA's A starts, in every component elsewhere."""
    data: Any = tiny_examples(24)
    first = bh.fit(tiny_model(), guide or "laplace", data, components=2, **QUICK)
    own = bh.priors.FunctionSpaceNormal(change=0.1)
    second = first.update(tiny_examples(24, seed=3), prior=own, guide=guide, **QUICK)
    every = []
    for last, new in zip(first.components, second.components, strict=True):
        prior = new.model.prior.moments()  # type: ignore[attr-defined]
        for name in ("lora.query.A", "lora.value.A"):
            mean, sd = prior[name]
            if guide is None:
                torch.testing.assert_close(mean, last.guide.means()[name])
            assert ((new.guide.means()[name] - mean) / sd).abs().max() < 3
        assert not prior["head.weight"][0].any() and not prior["lora.query.B"][0].any()
        every.append(prior["lora.query.A"][0])
    assert (every[0] - every[1]).abs().max() > 0.1
    assert second.report.history[0]["loss"] < 2


def test_a_posterior_that_is_passed_on_by_hand_stays_what_it_is() -> None:
    """No guide sets its scales again, as if it were the default prior."""
    model = tiny_model(())
    guide = bh.guides.LaplaceGuide(model, rank=1)  # most of what is learnt is in the diagonal
    first = bh.fit(model, guide, tiny_examples(400, seed=1), **QUICK)
    prior: Any = first.as_prior()
    data = tiny_examples(9, seed=3)
    known = first.update(data, **QUICK).model.prior.moments()["head.weight"]  # type: ignore[attr-defined]
    own = first.update(data, prior=prior, **QUICK).model.prior.moments()["head.weight"]  # type: ignore[attr-defined]
    torch.testing.assert_close(own, known)
    again = bh.fit(bh.Model(model.network, prior), "laplace", data, components=1, **QUICK)
    torch.testing.assert_close(again.model.prior.moments()["head.weight"], known)  # type: ignore[attr-defined]


def test_the_same_family_goes_on_with_its_tau() -> None:
    first = bh.fit(tiny_model(()), "laplace", tiny_examples(24), components=1, tau=7.0, **QUICK)
    again = first.update(tiny_examples(9, seed=3), guide="laplace", tau=None, **QUICK)
    assert again.report.tau == 7.0


@pytest.mark.parametrize("option", ["grow", "again"])
def test_a_word_is_no_truth_value(first: bh.Posterior, option: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{option}='no'"):
        first.update(tiny_examples(24), **{option: "no"}, **QUICK)  # type: ignore[arg-type]
    weeks = {"week 0": tiny_examples(24)}
    with pytest.raises(ConfigError, match=f"{option}='no'"):
        bh.stream(tiny_model(()), weeks, tmp_path, **{option: "no"}, **QUICK)  # type: ignore[arg-type]


def test_another_family_has_the_first_prior_of_the_one_before(first: bh.Posterior) -> None:
    data = tiny_examples(9, seed=3)
    second = first.update(data, guide="laplace", **QUICK)
    guide: Any = second.guide
    sds, after = {x.name: x.scale for x in latents(first.model)}, first.guide.scales()  # type: ignore[operator]
    for name, sd in guide.unpack(guide.first_scale).items():
        torch.testing.assert_close(sd, sds[name].maximum(after[name]))
        assert (sd == sds[name]).float().mean() > 0.8  # elsewhere a short fit has widened it
    narrow, wide = (carried(first, data, tau, guide="laplace") for tau in (10.0, 0.01))
    torch.testing.assert_close(narrow, wide)
    # Rows choose a tau below 1: what a part of the evidence leaves must stay a precision.
    rows = tiny_examples(9, seed=5)
    third = second.update(tiny_examples(9, seed=4), keep=0.5, validation=rows, **QUICK)
    assert third.predict(["w5"]).probabilities.isfinite().all()


def test_a_prior_that_is_wider_than_the_first_one_takes_its_place() -> None:
    first = bh.fit(tiny_model(()), "laplace", tiny_examples(24), components=1, **QUICK)
    own = first.update(tiny_examples(9, seed=3), prior=dist.Normal(0.0, 0.05), **QUICK)
    data = tiny_examples(9, seed=4)
    sds = [carried(own, data, tau, keep=0.5) for tau in (1.0, 0.5, 2.0)]
    torch.testing.assert_close(sds[1], sds[0])
    torch.testing.assert_close(sds[2], sds[0])
    assert sds[0].max() > 0.06  # half of what was learnt is forgotten


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


def test_a_prior_may_sample_the_sites_in_another_order_than_the_one_before(
    tmp_path: Path,
) -> None:
    def own(sites: Any) -> dict[str, torch.Tensor]:
        return {s.name: pyro.sample(s.name, wide(s)) for s in sites}

    def backwards(sites: Any) -> dict[str, torch.Tensor]:
        return own(sites[::-1])

    def wide(site: Any) -> Any:
        sd = 0.5 if site.name.startswith("head") else 0.05
        return dist.Normal(0.0, sd).expand(site.shape).to_event(len(site.shape))

    model = tiny_model(bh.presets.lora(rank=1))
    first = bh.fit(model, "laplace", tiny_examples(24), components=1, **QUICK)
    found = [first.update(tiny_examples(9, seed=3), prior=p, **QUICK) for p in (own, backwards)]
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
