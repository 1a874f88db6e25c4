"""Guides of blocks against the closed forms of a linear regression, and what they are made of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from components import same
from exact import WIDTH, Exact, flat, own_network, random_texts, ratings, regression
from saves import load
from torch.distributions import Normal
from torch.optim import SGD

import bhpeft_pyro as bh
from bhpeft_pyro.errors import GuideError
from bhpeft_pyro.guides import MeanFieldGuide
from bhpeft_pyro.priors import PosteriorPrior
from bhpeft_pyro.testing import tiny_examples, tiny_model

NOISE, PRIOR_SD = 2.0, 0.7
POINT_BIAS = {"head.bias": "delta", "head.weight": "normal"}
MIXED = {"lora.*.A": "normal", "lora.*.B": ("delta", {"width": 0.05}), "*": "normal"}
QUICK: dict[str, Any] = {"max_steps": 20, "lr": 0.1, "progress": False}


def regress(**changes: Any) -> tuple[bh.Posterior, Exact]:
    """A regression whose bias is a point estimate."""
    model = regression(own_network(), PRIOR_SD, NOISE)
    examples = ratings(model.network, random_texts(64, 3), seed=3, noise=NOISE)
    options = {"max_steps": 300, "batch_size": 64, "lr": 0.1, "progress": False}
    posterior = bh.fit(model, POINT_BIAS, examples, **{**options, **changes})
    return posterior, Exact.of(model, examples)


@pytest.fixture(scope="module")
def mixed() -> bh.Posterior:
    return bh.fit(tiny_model(bh.presets.bh_peft()), MIXED, tiny_examples(48), **QUICK)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_a_point_is_the_map_estimate_given_the_rest(temperature: float) -> None:
    posterior, exact = regress(temperature=temperature)
    tempered = Exact(exact.x, exact.y, PRIOR_SD / temperature**0.5, NOISE)  # T times the prior's
    guide: Any = posterior.guide
    mean = flat(guide.means())
    assert ((mean - tempered.mean) / exact.sd).abs().max() < 0.3
    sds = guide.scales()["head.weight"][0] / temperature**0.5
    assert (sds / tempered.mean_field_sd[:WIDTH]).log().abs().max() < 0.2


def test_a_point_costs_minus_its_log_prior_and_the_report_says_so() -> None:
    posterior, _ = regress(max_steps=5)
    at = posterior.guide.means()["head.bias"]  # type: ignore[operator]
    cost = -Normal(0.0, PRIOR_SD).log_prob(at).item()
    assert posterior.report.kl["head.bias"] == pytest.approx(cost, rel=1e-5)
    assert posterior.report.points == ["head.bias"]
    assert list(posterior.report.scales) == ["head.weight"]
    assert f"head.bias    point estimate, -log prior density {cost:.2f} nats" in str(
        posterior.report
    )


def test_normal_blocks_are_the_normal_guide() -> None:
    one, many = (
        bh.fit(tiny_model(bh.presets.bh_peft()), guide, tiny_examples(24), **QUICK)
        for guide in ("normal", {"lora.*": "normal", "*": "normal"})
    )
    assert [x["loss"] for x in one.report.history] == [x["loss"] for x in many.report.history]
    assert one.report.kl == many.report.kl and one.report.scales == many.report.scales
    assert torch.equal(*(fit.predict(["w5 w20"], 4).probabilities for fit in (one, many)))


def test_points_need_a_width_to_be_a_prior(mixed: bh.Posterior) -> None:
    posterior = bh.fit(tiny_model(()), POINT_BIAS, tiny_examples(8), **QUICK)
    with pytest.raises(GuideError, match=r"no width.*width=\.\.\."):
        posterior.update(tiny_examples(8, seed=5))
    prior = mixed.as_prior()
    assert isinstance(prior, PosteriorPrior)
    point = prior.distributions["lora.value.B"]
    unit = next(site.unit for site in mixed.model.sites if site.name == "lora.value.B")
    torch.testing.assert_close(point.mean, mixed.guide.means()["lora.value.B"])  # type: ignore[operator]
    torch.testing.assert_close(point.stddev, (0.05 * unit).expand(point.event_shape))
    with pytest.raises(GuideError, match="width=0"):
        bh.autoguide("delta", tiny_model(()), width=0)


def test_two_rounds_are_saved_bit_by_bit(mixed: bh.Posterior, tmp_path: Path) -> None:
    posterior = mixed
    for number in range(2):
        posterior.save(tmp_path / str(number))
        again = load(tmp_path / str(number))
        assert same(posterior, again)
        assert isinstance(again.guide, MeanFieldGuide) and isinstance(
            posterior.guide, MeanFieldGuide
        )
        assert again.guide.title() == posterior.guide.title()
        assert again.report.points == posterior.report.points
        following = [p.update(tiny_examples(24, seed=9 + number)) for p in (posterior, again)]
        assert torch.equal(*(p.predict(["w5", "w9"], 4).probabilities for p in following))
        posterior = following[1]


def test_new_labels() -> None:
    families = {"head.*": "normal", "*": ("delta", {"width": 0.1})}
    first = bh.fit(tiny_model(), families, tiny_examples(24), **QUICK)
    grown = first.grow(["2"])
    assert grown.guide.means()["head.weight"].shape == (3, 16)  # type: ignore[operator]
    updated = grown.update(tiny_examples(12, seed=4), max_steps=3)
    assert updated.predict(["w5"], 2).probabilities.shape == (1, 3)
    points = {"head.bias": ("delta", {"width": 0.1}), "*": "normal"}
    with pytest.raises(GuideError, match=r"point estimates cannot get new rows of head\.bias"):
        bh.fit(tiny_model(()), points, tiny_examples(), **QUICK).grow(["2"])


@pytest.mark.parametrize(
    ("name", "kinds", "random"),
    [
        ("down only", bh.presets.bh_peft(), ["lora.query.A", "lora.value.A", "adapter.down"]),
        ("down only", bh.presets.mam(), ["adapter.down"]),
        ("A only", bh.presets.bh_peft(), ["lora.query.A", "lora.value.A"]),
    ],
)
def test_presets_leave_points(name: str, kinds: Any, random: list[str]) -> None:
    model = tiny_model(kinds)
    posterior = bh.fit(model, name, tiny_examples(48), **QUICK)
    assert sorted(posterior.report.scales) == sorted(random)
    points = {site.name for site in model.sites} - set(random)
    assert set(posterior.report.points) == points
    draws = posterior.sample(4)
    for site, values in draws.items():
        assert (values.std(0) > 0).all() == (site in random), site
    start = bh.autoguide(name, model).means()
    moved = {site for site in points if not torch.equal(start[site], draws[site][0])}
    assert moved == points  # points are fitted
    assert posterior.predict(["w5 w20"], 4).epistemic.item() > 0


def test_presets_follow_a_priors_own_latents_and_take_a_width() -> None:
    model = tiny_model(prior=bh.priors.Hierarchical())
    guide = bh.autoguide("A only", model, width=0.1)
    assert isinstance(guide, MeanFieldGuide)
    assert "lora.query.A.standard" in guide.scales()
    assert "lora.query.B.log_scale" in guide.points()
    assert ("delta", {"width": 0.1}) in guide.families.values()  # type: ignore[union-attr]
    with pytest.raises(GuideError, match=r"'A only' does not take \{'rank': 3\}"):
        bh.autoguide("A only", model, rank=3)
    for name in ("down only", "A only"):
        with pytest.raises(GuideError, match=r"needs a site whose name.*sites: head\.weight"):
            bh.fit(tiny_model(()), name, tiny_examples(), **QUICK)


def test_peft_points_stay_while_the_head_is_fitted_on_frozen_features() -> None:
    """Their prior alone would take them to its mode; at zero, B and A have no gradient."""
    model = tiny_model(prior=dist.Normal(0.0, 0.01))
    guide = bh.autoguide({"head.*": "normal", "*": "delta"}, model)
    before = guide.means()
    # The fit proper moves nothing.
    bh.fit(model, guide, tiny_examples(), optimizer=lambda found: SGD(found, lr=0.0), **QUICK)
    after = guide.means()
    for name in after:
        assert torch.equal(after[name], before[name]) == name.startswith("lora."), name
    assert all(parameter.requires_grad for parameter in guide.parameters())


@pytest.mark.parametrize(
    ("families", "message"),
    [
        ({"head.*": "normal"}, r"no pattern matches the site 'lora\.query\.A'; patterns: 'head"),
        ({"haed.*": "delta", "*": "normal"}, r"'haed\.\*' match no site.*lora\.query\.A"),
        ({"*": "normal", "head.*": "delta"}, r"'head\.\*' match no site that an earlier"),
        ({"*": "laplace"}, r"unknown family 'laplace' at '\*'; expected one of normal, delta"),
    ],
)
def test_bad_blocks_are_refused(families: Mapping[str, Any], message: str) -> None:
    with pytest.raises(GuideError, match=message):
        bh.fit(tiny_model(), families, tiny_examples(), **QUICK)
    with pytest.raises(GuideError, match=r"a mapping does not take \{'rank': 3\}"):
        bh.autoguide({"*": "normal"}, tiny_model(), rank=3)


def test_a_joint_prior_is_refused_and_its_marginals_are_not() -> None:
    whole = bh.fit(tiny_model(()), "laplace", tiny_examples(), components=1, **QUICK)
    model = bh.Model(whole.model.network, whole.as_prior())
    for guide in (POINT_BIAS, "normal", "delta"):
        with pytest.raises(GuideError, match=r"samples head\.weight, head\.bias jointly.*laplace"):
            bh.fit(model, guide, tiny_examples(), **QUICK)
    apart = whole.model.with_prior(whole.as_prior().independent())  # type: ignore[attr-defined]
    for guide in (POINT_BIAS, "normal"):
        assert bh.fit(apart, guide, tiny_examples(seed=1), **QUICK).report.steps
