"""Components: independent fits as one posterior, an equal-weight mixture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from components import FIRST, SECOND, TEXTS, fit, probabilities, same
from exact import KnownNoise, flat
from guide_functions import around
from onehot import FIT, assert_posterior, exact, model, network, words
from torch.distributions import kl_divergence
from torch.optim import Adam

import bhpeft_pyro as bh
from bhpeft_pyro.base.distributions import LowRankNormal
from bhpeft_pyro.base.values import derived
from bhpeft_pyro.diagnostics import psis
from bhpeft_pyro.errors import BHPEFTWarning, ConfigError, FitError, GuideError
from bhpeft_pyro.guides import DrawsGuide, Guide, LaplaceGuide, MeanFieldGuide
from bhpeft_pyro.guides.laplace.curvature import Information
from bhpeft_pyro.model.likelihoods import Normal
from bhpeft_pyro.peft import LoRA
from bhpeft_pyro.posterior.learn import optimise
from bhpeft_pyro.prediction.draws import draw
from bhpeft_pyro.prediction.predict import predict
from bhpeft_pyro.priors import FunctionSpaceNormal, JointPrior, unpack
from bhpeft_pyro.testing import tiny_examples, tiny_model
from bhpeft_pyro.training import loop

# Against closed forms


def test_every_component_and_the_mixture_meet_the_exact_posterior() -> None:
    data = words(64, seed=3)
    options = {**FIT, "max_steps": 150, "batch_size": 64}
    posterior: Any = bh.fit(model(), "normal", data, components=2, **options)
    for each in posterior.components:
        assert_posterior(each.guide, [(data, 1.0)], tolerance=0.3)
    mean, sd = exact([(data, 1.0)])
    drawn = posterior.sample(3000)["head.weight"][:, 0].double()
    assert ((drawn.mean(0) - mean) / sd).abs().max() < 0.2
    assert (drawn.std(0) / sd).log().abs().max() < 0.15


@dataclass(frozen=True)
class Squared(KnownNoise):
    """The sign of what the network says is not seen: two modes."""

    def distribution(self, outputs: Any) -> Any:
        return dist.Normal(outputs.values[..., 0].square(), self.sd)


def test_each_component_finds_a_mode_and_the_mixture_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_WARM_UP", 0.0)  # large steps at once, away from between the modes
    labels = [1.2, 0.8, 1.1, 0.9, 1.3] * 4
    rows = {"text": ["w5"] * len(labels), "label": labels}
    prior = {"head.bias": dist.Normal(0.0, 1e-4), "*": dist.Normal(0.0, 1.0)}
    bimodal = bh.Model(network(), prior, Squared(0.5))
    data = bh.data.encode(rows, bimodal.network.tokenizer, kind="rating")
    options: dict[str, Any] = {**FIT, "max_steps": 200}
    posterior: Any = bh.fit(
        bimodal, "normal", data, components=4, optimizer=lambda ps: Adam(ps, lr=0.2), **options
    )
    found = torch.stack([flat(each.guide.means())[0] for each in posterior.components])
    torch.testing.assert_close(found.abs(), torch.ones(4).double(), atol=0.1, rtol=0.0)
    assert 0 < (found > 0).sum() < 4
    drawn = posterior.sample(600)["head.weight"][:, 0, 0]
    assert ((drawn > 0).float().mean() - (found > 0).float().mean()).abs() < 1e-6
    # Each mode has half of the evidence.
    grid = torch.linspace(-4, 4, 20001).double()
    density = dist.Normal(0.0, 1.0).log_prob(grid) + sum(
        dist.Normal(grid.square(), 0.5).log_prob(torch.tensor(y)) for y in labels
    )
    evidence = torch.trapezoid(density.exp(), grid).log().item()
    single = psis(posterior.components[0], data, 2000).log_evidence
    assert single == pytest.approx(evidence - math.log(2), abs=0.15)


# Starts and seeds


@pytest.mark.parametrize("guide", ["normal", "laplace"])
def test_the_first_component_is_the_single_fit_and_others_start_elsewhere(guide: str) -> None:
    posterior, single = fit(guide), fit(guide, components=1)
    assert single.components == (single,)
    assert same(posterior.components[0], single)
    assert posterior.components[0].report.history == single.report.history
    locs = [each.guide.means()["lora.query.A"] for each in posterior.components]
    for one in range(3):
        for other in range(one):
            assert not torch.allclose(locs[one], locs[other], rtol=0.1)
    assert [each.report.options.seed for each in posterior.components] == [0, 1000, 2000]
    assert posterior.report.options.seed == 0
    priors = [each.model.prior for each in posterior.components]
    assert len({*map(id, priors)}) == (3 if guide == "laplace" else 1)
    assert posterior.model.prior is priors[0]


@pytest.mark.parametrize("given", [None, FunctionSpaceNormal(change=0.2, head=2.0)])
def test_every_laplace_approximation_starts_at_a_projection_of_its_own(
    given: FunctionSpaceNormal | None,
) -> None:
    """Which its prior has for its mean; the output side starts at zero, held-out rows or not."""
    of = tiny_model(prior=given)
    data = tiny_examples(60)
    options: dict[str, Any] = {"max_steps": 1, "lr": 1e-9, "components": 3, "progress": False}
    posterior: Any = bh.fit(of, "laplace", data, **options)
    units = {site.name: site.unit for site in of.sites}
    starts = []
    for each in posterior.components:
        means, prior = each.guide.means(), each.model.prior
        assert isinstance(prior, JointPrior) and each.first_priors == (prior,)
        torch.testing.assert_close(each.guide.loc.detach(), prior.normal.loc, rtol=0, atol=1e-7)
        assert not any(means[name].abs().max() > 1e-7 for name in means if name[-1] != "A")
        starts.append(of.network.coordinates(means)["lora.query.A"])
        sds = unpack(prior.normal.covariance.scale, prior.shapes)
        for name, sd in sds.items():
            if given is None:  # of equal effect: one number a site
                torch.testing.assert_close(sd.min(), sd.max(), rtol=1e-6, atol=0)
            else:
                size = {"A": 0.1, "B": 0.2}.get(name[-1], 2.0)
                torch.testing.assert_close(sd, (size * units[name]).expand(sd.shape))
    for one in range(3):
        for other in range(one):
            across = torch.nn.functional.cosine_similarity(
                starts[one].flatten(), starts[other].flatten(), 0
            )
            assert across.abs() < 0.5  # 4 sds


def test_a_laplace_approximations_kl_is_to_the_prior_that_is_kept() -> None:
    """Its own, of which the scales have been set since: gates are no exception."""
    of = tiny_model((LoRA(rank=2, gated=True),))
    for each in fit("laplace", 2, of, max_steps=20).components:
        prior = each.model.prior.normal
        now = LowRankNormal(each.guide.loc, each.guide.unscaled)
        assert each.report.kl == {"weights": pytest.approx(kl_divergence(now, prior).item())}
        assert sum(each.report.kl.values()) > 0.1


def test_a_prior_mean_of_ones_own_on_an_input_side_stays() -> None:
    priors = {"lora.*.A": dist.Normal(5.0, 0.01), "*": dist.Normal(0.0, 0.1)}
    model = bh.Model(tiny_model().network, priors)
    with pytest.warns(BHPEFTWarning, match="components=2: all start at the mean of the prior"):
        posterior = fit("laplace", 2, of=model, max_steps=1, lr=1e-9)
    for each in posterior.components:
        means = each.guide.unpack(each.guide.prior.loc)
        assert (means["lora.query.A"] == 5).all() and (means["lora.query.B"] == 0).all()
        assert (each.guide.means()["lora.query.A"] - 5).abs().max() < 1e-3


@pytest.mark.parametrize("guide", ["delta", "down only", "mvn"])
def test_starts_are_draws_of_the_priors_sds(guide: str) -> None:
    of = tiny_model(())
    if guide == "down only":
        of = tiny_model()
    starts = fit(guide, of=of, max_steps=1, lr=1e-9)
    assert starts.components[1].predict(TEXTS, 4).probabilities.isfinite().all()
    site = next(
        s for s in of.sites if s.name == ("lora.query.B" if of.network.kinds else "head.weight")
    )
    away = [each.guide.means()[site.name] - site.init() for each in starts.components]
    assert away[0].abs().max() < 1e-3
    assert not torch.allclose(away[1], away[2])
    trace = pyro.poutine.trace(starts.model.prior).get_trace(of.sites)
    sd = trace.nodes[site.name]["fn"].stddev
    for value in away[1:]:
        assert 0.6 < (value / sd).std() < 1.5


def test_the_seed_covers_what_a_function_draws_for_its_parameters() -> None:
    of = tiny_model(())
    one, other = (fit(around(of, torch.randn), 1, of, seed=3) for _ in range(2))
    assert same(one, other)


def test_pyros_guides_and_functions_have_components_too() -> None:
    mixture = fit("AutoNormal", 2)
    assert mixture.predict(TEXTS, 4).probabilities.isfinite().all()
    with pytest.raises(ConfigError, match="this posterior has 2; expected `guides`"):
        mixture.as_prior()
    of = tiny_model(())
    guide = around(of, torch.randn)
    one, other = fit(guide, 2, of).components
    assert not same(one, other)
    with pytest.raises(GuideError, match="FunctionGuide does not say how"):
        fit(guide, 2, of).components[0].as_prior()


def test_there_are_five_of_a_laplace_approximation_and_one_of_the_others() -> None:
    of = tiny_model(())
    others: list[Any] = ["normal", "delta", "AutoNormal", {"*": "normal"}]
    for name in others:
        assert len(bh.fit(of, name, FIRST, max_steps=1, progress=False).guides) == 1
    posterior: Any = bh.fit(of, "laplace", FIRST, max_steps=1, progress=False)
    assert [type(each.guide) for each in posterior.components] == [LaplaceGuide] * 5
    alone = bh.fit(of, "laplace", FIRST, max_steps=1, components=1, progress=False)
    assert isinstance(alone.guide, LaplaceGuide)


def test_a_list_of_guides_is_fitted_in_place() -> None:
    of = tiny_model(())
    guides = [bh.autoguide("normal", of) for _ in range(2)]
    posterior = bh.fit(of, guides, FIRST, max_steps=2, progress=False)
    assert [each.guide for each in posterior.components] == guides
    assert [each.report.steps for each in posterior.components] == [2, 2]
    with pytest.raises(ConfigError, match="components=3: got 2 guides"):
        bh.fit(of, guides, "no such data", components=3)


def test_a_guide_that_has_one_start_is_refused() -> None:
    of = tiny_model(())
    with pytest.raises(ConfigError, match="components=2: got 1 guides"):
        bh.fit(of, MeanFieldGuide(of), "no such data", components=2)
    with pytest.raises(ConfigError, match="got 0 guides"):
        bh.fit(of, [], "no such data")


def test_a_component_that_fails_leaves_those_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    of = tiny_model(())
    whole = fit(of=of)
    left = iter(range(2))  # fits that are still to succeed

    def failing(*args: Any) -> Any:
        if next(left, None) is None:
            raise FitError("not finite")
        return optimise(*args)

    monkeypatch.setattr("bhpeft_pyro.posterior.learn.optimise", failing)
    with pytest.raises(FitError) as error:
        fit(of=of)
    kept: Any = error.value.posterior
    assert len(kept.components) == 2 and kept.novelty is not None
    assert all(same(*pair) for pair in zip(kept.components, whole.components, strict=False))
    left = iter(range(1))
    with pytest.raises(FitError) as error:
        whole.update(SECOND)
    kept = error.value.posterior
    assert len(kept.lineage) == 2 and len(kept.components) == 1
    assert len(kept.novelty.last) > len(whole.novelty.last)
    left = iter(())
    with pytest.raises(FitError) as error:
        fit(of=of)
    assert len(error.value.posterior.guides) == 1  # type: ignore[union-attr]  # the last good state


def test_too_little_memory_for_a_width_leaves_the_fitted_components(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compute, left = Information.of, iter(range(2))

    def failing(*args: Any, **how: Any) -> Any:
        if next(left, None) is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(*args, **how)

    def passes(*_: Any, **__: Any) -> None:
        pytest.fail("all texts went through the transformer")

    monkeypatch.setattr(Information, "of", failing)
    monkeypatch.setattr("bhpeft_pyro.model.cached_batches.check_all", passes)
    with pytest.raises(FitError, match=r"ended after 2 of 3 components: .*out of memory") as error:
        fit("laplace", max_steps=2)
    kept: Any = error.value.posterior
    assert len(kept.components) == 2 and kept.predict(["w5 w9"]).probabilities.isfinite().all()
    with pytest.raises(torch.OutOfMemoryError):  # there is nothing to keep
        fit("laplace", max_steps=2)


# Predictions


@pytest.fixture(scope="module")
def apart() -> Any:
    """Three components whose biases are moved to places of their own."""
    posterior = fit(of=tiny_model(()))
    for number, each in enumerate(posterior.components):
        with torch.no_grad():
            each.guide.loc["head/bias"].copy_(torch.tensor([float(number), -float(number)]) * 50)
    return posterior


def test_draws_are_shared_out_evenly(apart: Any) -> None:
    drawn = apart.sample(12, seed=5)["head.bias"][:, 0]
    assert (drawn / 50).round().tolist() == [0.0] * 4 + [1.0] * 4 + [2.0] * 4
    assert len(apart.sample(10)["head.bias"]) == 12  # rounded up
    assert len(apart.sample(60)["head.bias"]) == 60  # more than are drawn at a time
    torch.testing.assert_close(drawn[:4], apart.components[0].sample(4, seed=5)["head.bias"][:, 0])
    spread = apart.sample(30)["head.bias"][:, 1].reshape(3, 10)
    spread = spread - spread.mean(1, keepdim=True)
    assert not torch.allclose(spread[0], spread[1])  # not the same noise in each


def test_a_prediction_is_the_average_of_the_components() -> None:
    posterior = fit()
    drawn = draw(posterior.model, posterior.guides, 12, seed=5)
    total = torch.zeros(3, 2)
    for number, each in enumerate(posterior.components):
        own = {name: value.split(4)[number][:, 0] for name, value in drawn.items()}
        replay = DrawsGuide.of(each.model, own)
        forecast: Any = predict(each.model, replay, each.encode(TEXTS, labelled=False), 4)
        total += forecast.probabilities / 3
    torch.testing.assert_close(probabilities(posterior, 12, seed=5), total, atol=1e-5, rtol=1e-4)


def test_each_component_is_linearised_around_its_own_mean() -> None:
    posterior = fit("laplace", max_steps=20, lr=0.05)
    assert posterior.linear
    components = enumerate(posterior.components)
    parts = [each.predict(TEXTS, 2000, seed=derived(0, n)) for n, each in components]
    means = torch.stack([part.probabilities for part in parts])
    together = posterior.predict(TEXTS, 6000)
    torch.testing.assert_close(together.probabilities, means.mean(0))
    # What there is to know apart from the components', and between them.
    between = torch.special.entr(means.mean(0)).sum(-1) - torch.special.entr(means).sum(-1).mean(0)
    torch.testing.assert_close(together.between, between, rtol=1e-3, atol=1e-6)
    within = torch.stack([part.epistemic for part in parts]).mean(0)
    torch.testing.assert_close(together.epistemic, within + between, rtol=1e-3, atol=1e-6)
    assert (between > 0).all() and parts[0].between is None


@pytest.mark.parametrize("guide", ["delta", "normal"])
def test_draws_say_how_much_components_disagree(guide: str) -> None:
    posterior = fit(guide, max_steps=20, lr=0.05).replace(novelty=None)
    found, pooled = posterior.predict(TEXTS), posterior.predict(TEXTS, 33, keep_samples=True)
    assert found.draws == pooled.draws == 33 and found.samples is None
    by_component = pooled.samples.unflatten(0, (3, 11)).mean(1)  # kept in the components' order
    if guide == "delta":
        last = posterior.components[2].predict(TEXTS).probabilities
        torch.testing.assert_close(by_component[2], last)
    for name in ("probabilities", "total", "aleatoric", "epistemic", "variance", "between"):
        torch.testing.assert_close(getattr(found, name), getattr(pooled, name), msg=name)
    if guide == "delta":
        torch.testing.assert_close(found.between, found.epistemic)
        assert (found.between > 0).all()
    else:
        assert ((found.between > 0) & (found.between < found.epistemic)).all()


@pytest.mark.parametrize("guide", ["delta", "normal"])
def test_draws_of_ratings_say_it_too(guide: str) -> None:
    rated = {"text": list(FIRST.texts), "label": FIRST.labels.float().tolist()}
    options = {"components": 3, "max_steps": 20, "progress": False}
    posterior = bh.fit(tiny_model((), 1, likelihood=Normal(0.5, 0.5)), guide, rated, **options)
    forecast: Any = posterior.predict(TEXTS, 6)
    means = forecast.means.view(3, 2, -1).mean(1)
    torch.testing.assert_close(forecast.between, means.var(0, correction=0))
    assert "6 draws" in repr(forecast)
    if guide == "delta":
        torch.testing.assert_close(forecast.between, forecast.epistemic)
        torch.testing.assert_close(posterior.predict(TEXTS, 0).between, forecast.between)
    assert posterior.components[0].predict(TEXTS).between is None


def test_members_that_contradict_each_other_disagree() -> None:
    model = tiny_model()
    data = {"text": list(FIRST.texts), "label": FIRST.labels.tolist()}
    other = data | {"label": [1 - label for label in data["label"]]}
    options: dict[str, Any] = {"temperature": 0.0, "max_steps": 80, "lr": 0.05, "progress": False}
    parts = [bh.fit(model, "delta", each, **options) for each in (data, other)]
    both = bh.Posterior.mixture(parts).replace(novelty=None)
    for how in ({}, {"samples": 0}, {"keep_samples": True}):
        assert both.predict(data["text"][:4], **how).reasons() == ["models disagree"] * 4, how


def test_a_report_tells_how_each_component_ended() -> None:
    posterior = fit("laplace", 2, validation=SECOND)
    text = str(posterior.report)
    assert "12 held-out rows" in text
    for number, each in enumerate(posterior.components, 1):
        report = each.report
        stopped = report.best_step
        assert f"component {number}: point estimate of step {stopped}, prior weight 0, tau" in text


def test_components_of_a_point_are_a_deep_ensemble() -> None:
    posterior = fit("delta", lr=0.05, max_steps=20, particles=1)
    members = torch.stack([probabilities(each, 0) for each in posterior.components])
    assert (members.std(0) > 1e-4).all()
    for samples in (0, 1, 3, 6):
        torch.testing.assert_close(probabilities(posterior, samples), members.mean(0))
    # Their disagreement is epistemic uncertainty; a single point has none.
    entropy = torch.special.entr(members.mean(0)).sum(-1)
    expected = entropy - torch.special.entr(members).sum(-1).mean(0)
    torch.testing.assert_close(posterior.predict(TEXTS, 0).epistemic, expected)
    assert posterior.components[0].predict(TEXTS, 3).epistemic.abs().max() < 1e-6
    with pytest.raises(GuideError, match="so it has no density"):
        psis(posterior, FIRST, 100)
    with pytest.raises(GuideError, match="no width"):
        posterior.update(SECOND)


def test_reports_are_of_each_and_of_all() -> None:
    posterior = fit(of=tiny_model(()), validation=SECOND)
    reports = [each.report for each in posterior.components]
    assert posterior.report.components == reports
    assert posterior.report.steps == 12 and reports[0].steps == 4
    for step in range(4):
        losses = [report.history[step]["loss"] for report in reports]
        assert posterior.report.history[step]["loss"] == pytest.approx(sum(losses) / 3)
    assert "validation_nll" in posterior.report.history[1]
    text = str(posterior.report)
    assert text.startswith("3 components, 12 steps on 16 examples")
    for number, report in enumerate(reports, 1):
        assert f"component {number}: negative ELBO {report.last('loss'):.3f}" in text
    assert repr(posterior).startswith("Posterior(round 1, 3 x MeanFieldGuide(normal))\n")
    chains = posterior.to_arviz(FIRST, samples=6).posterior["head.bias"]
    assert dict(chains.sizes) == {"chain": 3, "draw": 6, "output": 2}


def test_each_component_is_diagnosed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior, runs, target = fit(of=tiny_model(())), [], Guide.target

    def counted(*args: Any, **more: Any) -> Any:
        runs.append(args)
        return target(*args, **more)

    monkeypatch.setattr(Guide, "target", counted)
    found = posterior.diagnose(FIRST, samples=100)
    assert len(runs) == len(found.components) == 3
    for number, part in enumerate(posterior.components):
        alone = part.diagnose(FIRST, samples=100, seed=derived(0, number))
        assert found.components[number] == alone and f"  {alone.psis}" in str(found)
    assert found.psis == psis(posterior, FIRST, samples=300)  # of all their draws


def test_a_mixture_is_diagnosed_with_the_rows_that_it_was_given() -> None:
    """Of which all its components have the same held out."""
    given = tiny_examples(60)
    learnt, held_out = given.hold_out(0)
    assert held_out is not None
    options: dict[str, Any] = {"max_steps": 4, "components": 2, "progress": False}
    posterior: Any = bh.fit(tiny_model(()), "laplace", given, **options)
    found = posterior.diagnose(given, samples=100)
    assert len(found.components) == 2
    # As text, since an evidence that is NaN equals no other from Python 3.13 on.
    assert repr(found) == repr(posterior.diagnose(learnt, samples=100))
    point: Any = bh.fit(tiny_model(()), "delta", given, **options)
    for part in (point, point.components[1]):  # a width is chosen by rows that were not learnt
        whole, apart = part.widen(given), part.widen(learnt, validation=held_out)
        assert whole.report.held_out == apart.report.held_out == 12
        assert whole.report.seconds > part.report.seconds
        assert torch.equal(probabilities(whole), probabilities(apart))
        assert not torch.equal(probabilities(whole), probabilities(part.widen(learnt)))


def test_what_is_replaced_stays_replaced() -> None:
    whole = fit().replace(learnt_rows=None)
    assert whole.grow(["2"]).learnt_rows is None
