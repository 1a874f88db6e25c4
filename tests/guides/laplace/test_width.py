"""What fits and later rounds make of Laplace approximations: priors, objectives and widths."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import pytest
import torch
from exact import (
    Exact,
    KnownNoise,
    dense,
    flat,
    own_network,
    random_ratings,
    random_texts,
    regression,
)
from laplace_fits import NOISE, PLAIN, QUICK, exactly, guide_of
from linearised import centred, derivative
from torch import Tensor

import bhpeft_pyro as bh
from bhpeft_pyro.data import Examples
from bhpeft_pyro.diagnostics import psis
from bhpeft_pyro.forecast import metrics
from bhpeft_pyro.guides import LaplaceGuide
from bhpeft_pyro.guides.laplace import choice_of_tau, curvature, held_out_densities
from bhpeft_pyro.guides.laplace.choice_of_tau import Candidates
from bhpeft_pyro.guides.laplace.curvature import jacobians
from bhpeft_pyro.model.likelihoods import MultipleChoice, Normal
from bhpeft_pyro.model.linearized import jacobian
from bhpeft_pyro.peft.sites import Site
from bhpeft_pyro.priors import JointPrior
from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_model, tiny_tokenizer


def held_out_nll(exact: Exact, mean: Tensor, new: Exact, tau: float) -> float:
    """Of new rows, with `tau` times the prior's precision in the width; the mean stays."""
    wide = Exact(exact.x, exact.y, exact.prior_sd / tau**0.5, exact.noise)
    variance = (new.x @ wide.covariance * new.x).sum(1) + exact.noise**2
    normal = torch.distributions.Normal(new.x @ mean, variance.sqrt())
    return -normal.log_prob(new.y).mean().item()


@pytest.mark.parametrize(
    ("temperature", "rows", "used"), [(None, 64, 0.0), (0.3, 64, 0.3), (None, 48, 1.0)]
)
def test_earlier_data_act_in_full_and_the_first_prior_by_the_temperature(
    temperature: float | None, rows: int, used: float
) -> None:
    """The mean of a second round, in closed form; nothing of it is in what is carried over. What
    diagnostics compare the posterior with has that mean too. Few rows need the first prior."""
    model = regression(own_network(), noise=NOISE)
    parts = [random_ratings(model, 64, 3), random_ratings(model, rows, 4)]
    first = exactly(model, parts[0])
    second = first.update(parts[1], temperature=temperature, max_steps=400, lr=0.3)
    old, new = (Exact.of(model, part) for part in parts)
    first_prior = torch.eye(len(old.mean)) / old.prior_sd**2
    earlier = old.precision - first_prior + (used or 1e-4) * first_prior
    precision = earlier + new.precision - first_prior
    start, guide = flat(guide_of(first).means()), guide_of(second)
    expected = torch.linalg.solve(precision, earlier @ start + new.x.T @ new.y / NOISE**2)
    away = flat(guide.means()) - expected
    assert away @ precision @ away < 0.01
    both = Exact.of(model, parts[0].concat(parts[1]))
    assert second.report.temperature == used
    carried = torch.linalg.inv(dense(guide.as_prior().normal.covariance))
    torch.testing.assert_close(carried, both.precision, rtol=1e-2, atol=1e-2)
    found = psis(second, parts[1], samples=400)
    assert found.k_hat < 0.5 and found.effective_samples > 200, str(found)


def test_a_prior_that_may_contain_earlier_data_acts_in_full() -> None:
    """`update` holds no rows out, so the prior acts if there is no information of earlier data
    (all is forgotten), or if that cannot be told from the first prior, in this round and later."""
    model = regression(own_network(), noise=NOISE)
    parts = [random_ratings(model, 64, seed) for seed in (3, 4, 5)]
    first, new = exactly(model, parts[0]), Exact.of(model, parts[1])
    long: dict[str, Any] = {"temperature": None, "max_steps": 300}
    later = first.update(parts[1], keep=0.0, **long)
    assert later.report.temperature == 1
    assert ((flat(guide_of(later).means()) - new.mean) / new.sd).abs().max() < 0.05
    quick: dict[str, Any] = {"temperature": None, "max_steps": 1}
    unknown = first.replace(first_priors=(None,))
    for _ in range(2):
        unknown = unknown.update(parts[1], again=True, **quick)
        assert unknown.report.temperature == 1


def test_a_fit_under_an_earlier_posterior_weights_all_of_it() -> None:
    """For `fit` it is the first prior: with temperature 0 it does not act on the mean."""
    model = regression(own_network(), noise=NOISE)
    earlier = exactly(model, random_ratings(model, 64, 3)).as_prior()
    data = random_ratings(model, 64, 4)
    found = exactly(model.with_prior(earlier), data, temperature=0.0, lr=0.3, max_steps=1500)
    free = Exact.of(model, data, prior_sd=1e3)
    away = flat(guide_of(found).means()) - free.mean
    assert away @ free.precision @ away < 0.01


def test_the_reported_loss_counts_from_the_mode_of_the_prior() -> None:
    model = regression(own_network(), noise=NOISE)
    first = exactly(model, random_ratings(model, 64, 3))
    second = first.update(random_ratings(model, 64, 4), temperature=0.3)
    begin, end = second.report.history[0], second.report.history[-1]
    assert begin["kl"] == pytest.approx(0.0, abs=1e-3)  # a round starts at its prior's mode
    assert end["kl"] > 0.01
    assert end["loss"] == pytest.approx(end["nll"] + end["kl"], rel=1e-4)
    assert "+ penalty of the prior" in str(second.report)
    assert "first prior weight 0.3" in str(second.report)


def test_the_report_s_elbo_is_the_log_evidence_of_a_regression() -> None:
    model = regression(own_network(), noise=NOISE)
    examples = random_ratings(model, 32, 3)
    report = exactly(model, examples).report
    assert report.expected_nll is not None
    elbo = -(len(examples) * report.expected_nll + sum(report.kl.values()))
    assert elbo == pytest.approx(Exact.of(model, examples).log_evidence, abs=1.0)


def test_the_widths_prior_is_the_best_for_held_out_rows() -> None:
    """Tau against a brute-force search in the exact posteriors; the prior given is too wide."""
    model = regression(own_network(), prior_sd=3.0, noise=NOISE)
    examples, held_out = random_ratings(model, 24, 3), random_ratings(model, 200, 5)
    posterior = exactly(model, examples, tau=None, validation=held_out)
    exact = Exact.of(model, examples, prior_sd=3.0)
    new = Exact.of(model, held_out, prior_sd=3.0)
    mean, taus = flat(guide_of(posterior).means()), choice_of_tau.TAUS.tolist()
    nlls = {tau: held_out_nll(exact, mean, new, tau) for tau in taus}
    best = min(nlls, key=nlls.__getitem__)
    (chosen,) = [tau for tau in taus if tau == pytest.approx(posterior.report.tau)]
    assert nlls[chosen] == pytest.approx(nlls[best], abs=5e-3)
    assert posterior.report.component_nll == pytest.approx(nlls[chosen], abs=0.02)
    assert nlls[1.0] > nlls[best] + 0.02  # and it is not what was given


def test_every_site_moves_the_outputs_alike_under_the_default_prior() -> None:
    """By brute force: the variance of the linearised outputs, site by site."""
    model = tiny_model(bh.presets.lora(rank=2), outputs=3)
    guide = LaplaceGuide(model)
    with torch.no_grad():
        guide.loc.add_(0.3 * torch.randn(guide.loc.shape, generator=generator(1)))
    examples = tiny_examples(16)
    scale = curvature.equal_effect(
        model, guide.shapes, guide.first_scale, jacobians(model, guide.means(), examples)
    )
    batch = next(examples.batches(len(examples)))
    rows = centred(model, derivative(model, guide.means(), batch)[1], batch)
    effects = {  # two contrasts between three outputs
        name: part.square().sum((1, 2)).mean().item() / 2
        for name, part in ((n, (rows * scale)[..., at]) for n, at in places(guide).items())
    }
    assert len(effects) == len(model.sites)
    for effect in effects.values():
        assert effect == pytest.approx(1 / len(effects), rel=1e-3)


def test_choices_that_do_not_exist_have_no_part_in_the_prior_scales() -> None:
    """Under a likelihood of one's own too: in one batch all questions have five of them."""

    class Own(MultipleChoice):
        """Its outputs are not known to be logits."""

    network = bh.RandomPEFT(tiny_backbone(), (), bh.Head(1, principal=False), tiny_tokenizer())
    model = bh.Model(network, likelihood=Own())
    choices = [["w20", "w30", "w40", "w41", "w42"], ["w21", "w31"], ["w22", "w32"]]
    data = {"question": ["w5", "w6", "w7"], "choices": choices, "answer": [0, 1, 0]}
    examples = model.encode(data)
    guide = LaplaceGuide(model)

    def scales(*parts: Examples) -> Tensor:
        rows = [row for part in parts for row in jacobians(model, guide.means(), part)]
        return curvature.equal_effect(model, guide.shapes, guide.first_scale, rows)

    alone = scales(*(examples.subset([i]) for i in range(3)))
    torch.testing.assert_close(scales(examples), alone, rtol=1e-4, atol=0)


def test_a_width_under_which_a_rate_underflows_is_not_chosen() -> None:
    """Outputs are drawn with sds of up to 100, and a rate may be the exponential of one."""
    texts = [f"w{5 + i % 2} w{20 + i}" for i in range(120)]
    labels = [0.5 if i % 2 else 6.0 for i in range(120)]

    def waits(outputs: Tensor) -> dist.Exponential:
        return dist.Exponential((-1.0 - outputs[..., 0]).exp())

    network = bh.RandomPEFT(tiny_backbone(), bh.presets.lora(rank=2), bh.Head(1), tiny_tokenizer())
    options: dict[str, Any] = {"components": 2, "max_steps": 4, "progress": False}
    model = bh.Model(network, likelihood=waits)
    posterior = bh.fit(model, "laplace", {"text": texts, "label": labels}, **options)
    for part in posterior.components:
        assert part.report.component_nll < part.report.point_nll + 0.1


def test_every_round_sets_open_scales_again_and_keeps_what_was_learnt() -> None:
    """The precision is tau times that of scales of equal effect at the new point estimate, plus the
    information of both rounds, by brute force; a prior that is given stays as it is."""
    parts = [tiny_examples(24, seed=seed) for seed in (0, 1)]
    tau = 7.0
    options: dict[str, Any] = {"tau": tau, "temperature": 1.0, "max_steps": 40}

    def learnt(guide: LaplaceGuide) -> Tensor:
        """What all rounds' data have contributed to the precision."""
        root = guide.covariance.precision_root().double()
        rest = guide.covariance.scale.double() ** -2 - guide.tau * guide.first_scale.double() ** -2
        return rest.diag() + root @ root.mT

    given = bh.priors.FunctionSpaceNormal(change=0.3)
    for prior in (None, given):
        model = tiny_model(bh.presets.lora(rank=1), prior=prior)
        first = exactly(model, parts[0], **options)
        second = first.update(parts[1], again=True)
        old, guide = guide_of(first), guide_of(second)
        assert guide.joint_prior.open == (prior is None)
        fresh = LaplaceGuide(
            model.with_prior(given), len(guide.loc)
        )  # the second round's information alone
        fresh.move(guide.means())
        fresh.compute_width(model.with_prior(given), parts[1], None, bh.FitOptions(tau=tau))
        both = learnt(old) + learnt(fresh)
        torch.testing.assert_close(learnt(guide), both, rtol=2e-2, atol=2e-2)
        scale = guide.first_scale
        if prior is None:
            rows = jacobians(second.model, guide.means(), parts[1])
            scale = curvature.equal_effect(second.model, guide.shapes, guide.first_scale, rows)
            assert not torch.allclose(scale, old.first_scale, rtol=0.01)
        torch.testing.assert_close(guide.first_scale, scale)
        (known,), (before,) = second.first_priors, first.first_priors
        assert isinstance(known, JointPrior) and isinstance(before, JointPrior)
        torch.testing.assert_close(known.normal.stddev, scale)
        torch.testing.assert_close(known.normal.loc, before.normal.loc)


def test_a_tiny_first_round_does_not_make_later_ones_wide() -> None:
    """After one step weights have almost no effect, so their scales of equal effect are large."""
    options: dict[str, Any] = {"components": 1, "progress": False}
    model = tiny_model(bh.presets.lora(rank=2))
    first = bh.fit(model, "laplace", tiny_examples(8), max_steps=1, **options)
    second = first.update(tiny_examples(60, seed=1), max_steps=60, lr=0.05)
    batch = next(tiny_examples(16, seed=2).batches(16))
    rows = centred(
        second.model, derivative(second.model, guide_of(second).means(), batch)[1], batch
    )
    scales = (guide_of(each).first_scale for each in (first, second))
    early, late = ((rows * scale).square().sum(-1).mean().item() for scale in scales)
    assert early > 100 and late < 3  # on the rows of the round it is 1 / 2


def test_gates_keep_their_scale() -> None:
    """Before a branch has learnt anything its gate has no effect, at any scale."""
    model = tiny_model(bh.presets.unipelt())
    fitted = bh.fit(model, "laplace", tiny_examples(), components=1, **QUICK)
    scales = guide_of(fitted).unpack(guide_of(fitted).first_scale)
    gates = [site for site in model.sites if site.role == "gate"]
    assert gates
    for site in gates:
        torch.testing.assert_close(scales[site.name], (0.1 * site.unit).expand(site.shape))


def test_a_choice_that_does_not_exist_is_no_output() -> None:
    """Questions of two choices have one contrast each, whatever others share their batch."""
    model = tiny_model((), 1, likelihood=bh.likelihoods.MultipleChoice())
    choices = [[f"w{k}" for k in range(5 + i, 7 + i + 2 * (i == 0))] for i in range(9)]
    rows = {"question": ["w9"] * 9, "choices": choices, "answer": [0] * 9}
    examples = model.encode(rows)
    guide = LaplaceGuide(model)
    scale = curvature.equal_effect(
        model, guide.shapes, guide.first_scale, jacobians(model, guide.means(), examples)
    )
    variances = []
    for each in range(9):
        (batch,) = examples.subset([each]).batches(1)
        outputs = centred(model, derivative(model, guide.means(), batch)[1], batch)
        variances.append((outputs * scale).square().sum().item())
    contrasts = sum(map(len, choices)) - 9
    assert sum(variances) / contrasts == pytest.approx(1.0, rel=1e-3)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def places(guide: LaplaceGuide) -> dict[str, Tensor]:
    return {k: v.flatten() for k, v in guide.unpack(torch.arange(len(guide.loc))).items()}


def test_the_expected_nll_is_under_the_noise_that_was_chosen() -> None:
    """By the closed form: (e^2 + v) / 2 s^2 + log s, with v the variance at tau = 1."""
    rows = {"text": random_texts(24, seed=1), "label": torch.randn(24).tolist()}
    others = {"text": random_texts(40, seed=2), "label": torch.randn(40).tolist()}
    model = tiny_model((), 1, likelihood=Normal(0.0, 1.0))
    options = {"components": 1, "max_steps": 60, "validation": others, "progress": False}
    posterior = bh.fit(model, "laplace", rows, **options)
    guide, (batch,) = guide_of(posterior), posterior.encode(rows).batches(24)
    outputs, jacobians = jacobian(posterior.model, guide.means(), batch)
    variance = guide.as_prior().normal.covariance.projected(jacobians)[:, 0, 0].double()
    noise = guide.means()["noise.log_scale"].exp().double()
    assert batch.labels is not None and batch.labels.std() > 0
    errors = (batch.labels - outputs.mean[:, 0]).double()
    normal = torch.distributions.Normal(0.0, noise).log_prob(errors)
    expected = (-normal + variance / (2 * noise**2)).mean()
    # The noise scale varies too, by little; draws are 256.
    assert posterior.report.expected_nll == pytest.approx(expected.item(), abs=0.1)


class Shifted(bh.likelihoods.Categorical):
    """Classes whose logits have an offset of their own, which is no output of the network."""

    softmax = True
    sites = (Site("offset", (2,), ("output",), torch.ones(1), lambda: torch.tensor([2.0, -2.0])),)

    def distribution(self, outputs: Any) -> Any:
        return dist.Categorical(logits=outputs.values + outputs.weights["offset"])


@pytest.mark.parametrize("likelihood", [Shifted(), bh.likelihoods.MultipleChoice()])
def test_the_output_scale_is_chosen_by_the_forecasts_that_it_makes(likelihood: Any) -> None:
    model = tiny_model((), 1 if likelihood.kind == "choice" else 2, likelihood=likelihood)
    rows: Any = tiny_examples(60)
    if likelihood.kind == "choice":  # the last answer is missing in every third question
        right = [i % 2 for i in range(60)]
        answers = [
            [f"w{5 if k == right[i] else 6} w{20 + i}" for k in range(3 - i % 3 % 2)]
            for i in range(60)
        ]
        rows = {"question": random_texts(60), "choices": answers, "answer": right}
    posterior = bh.fit(model, "laplace", rows, components=2, max_steps=40, **PLAIN)
    held_out = posterior.encode(rows).hold_out(posterior.report.split or 0)[1]
    nll = metrics.evaluate(posterior.predict(held_out, samples=4000))["nll"]
    # The width was chosen by 256 points, among those of many widths.
    assert posterior.report.component_nll == pytest.approx(nll, abs=0.025)
    assert f"mixture: held-out NLL {posterior.report.component_nll:.3f}" in str(posterior.report)
    assert {each.report.output_scale for each in posterior.components} != {1.0}
    for each in posterior.components:
        assert guide_of(each).tau.item() == pytest.approx(each.report.tau)
        assert guide_of(each).output_scale.item() == pytest.approx(each.report.output_scale)


class Precise(Normal):
    """Every rating has an sd of its own, which is known up to a factor."""

    columns = ("sd",)

    def distribution(self, outputs: Any) -> Any:
        sd = outputs.weights["noise.log_scale"].exp() * outputs.extra["sd"]
        return dist.Normal(self._middle(outputs), sd)


def test_a_noise_that_differs_by_row_is_that_of_each_row() -> None:
    """The noise that is chosen, and the NLL that is reported, are those of the forecast."""
    noise = torch.randn(200, generator=generator(2))
    sds = torch.where(torch.arange(200) % 2 == 0, 0.1, 3.0)
    rows = {"text": random_texts(200), "label": (sds * noise).tolist(), "sd": sds.tolist()}
    train, held_out = (
        {k: v[part] for k, v in rows.items()} for part in (slice(100), slice(100, 200))
    )
    model = tiny_model((), 1, likelihood=Precise(0.0, 3.0))
    fitted = bh.fit(model, "laplace", train, components=1, validation=held_out, **QUICK)
    assert fitted.report.component_nll == pytest.approx(
        metrics.evaluate(fitted.predict(held_out))["nll"], rel=1e-3
    )
    assert fitted.report.noise == pytest.approx(3.0, rel=0.3)


def test_the_noise_is_chosen_with_the_width_of_every_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`test_estimated_noise` has what later rounds know of earlier ratings then."""
    free: list[bool] = []
    in_closed_form = held_out_densities.with_normal_noise

    def chosen(*args: Any) -> Candidates:
        free.append(args[-1])
        return in_closed_form(*args)

    monkeypatch.setattr(held_out_densities, "with_normal_noise", chosen)
    rows = {"text": random_texts(60), "label": [float(i % 5) for i in range(60)]}
    model = tiny_model(bh.presets.bh_peft(), 1, likelihood=Normal())
    first = bh.fit(model, "laplace", rows, components=1, **QUICK)
    new = {"text": random_texts(90)[60:], "label": [float(i % 3) for i in range(30)]}
    others = {"text": random_texts(120)[90:], "label": new["label"]}
    first.update(new, validation=others, max_steps=3)
    assert free == [True, True]


def test_a_later_rounds_width_is_chosen_by_the_forecasts_that_it_makes() -> None:
    rows = {"text": random_texts(60), "label": [float(i % 5) for i in range(60)]}
    model = tiny_model((), 1, likelihood=Normal())
    first = bh.fit(model, "laplace", rows, components=1, max_steps=40, progress=False)
    texts, labels = random_texts(120)[60:], [float(i % 3) for i in range(30)]
    new, others = ({"text": part, "label": labels} for part in (texts[:30], texts[30:]))
    second = first.update(new, validation=others, max_steps=20)
    assert second.report.component_nll == pytest.approx(
        metrics.evaluate(second.predict(others))["nll"], rel=5e-3
    )


class Constant(KnownNoise):
    """It says that predictions have a closed form, and has no noise scale to learn."""

    linear_mean = True


@pytest.mark.parametrize("guide", ["laplace", "delta"])
def test_a_noise_that_is_known_stays(guide: str) -> None:
    model = bh.Model(own_network(), dist.Normal(0.0, 0.7), Constant(NOISE))
    examples = random_ratings(model, 64, 3)
    posterior = bh.fit(model, guide, examples, components=1, **QUICK)
    forecast = posterior.predict(random_texts(9))
    assert isinstance(forecast, bh.forecast.RatingForecast) and posterior.report.noise is None
    torch.testing.assert_close(
        forecast.aleatoric, torch.full((9,), NOISE**2).to(forecast.aleatoric)
    )
    assert bool((forecast.epistemic > 0).all()) == (guide == "laplace")


@pytest.mark.parametrize("tau", [0.01, 1.0])
def test_a_given_tau_is_that_of_the_covariance(tau: float) -> None:
    """Of ratings too, whose noise scale is otherwise chosen with it."""
    rows = {"text": random_texts(60), "label": [float(i % 5) for i in range(60)]}
    model = tiny_model((), 1, likelihood=Normal())
    fitted = bh.fit(model, "laplace", rows, components=2, tau=tau, **QUICK)
    for each in fitted.components:
        assert each.report.tau == tau and guide_of(each).tau.item() == pytest.approx(tau)
    classes = bh.fit(tiny_model(()), "laplace", tiny_examples(60), components=1, tau=tau, **QUICK)
    assert classes.report.held_out and classes.report.output_scale == 1


def test_forecasts_do_not_depend_on_batches_padding_or_order() -> None:
    questions = [("w9 w10", ["w5", "w6 w7", "w8 w9 w11"]), ("w12 w13 w14 w15", ["w5 w6", "w30"])]
    questions += [(f"w{i}", ["w5", "w7 w8", "w20"]) for i in range(15, 30)]
    choice = tiny_model(bh.presets.bh_peft(), 1, likelihood=bh.likelihoods.MultipleChoice())
    rows = {
        "question": [q for q, _ in questions],
        "choices": [c for _, c in questions],
        "answer": [i % 2 for i in range(len(questions))],
    }
    posterior = bh.fit(choice, "laplace", rows, components=2, max_steps=4, progress=False)
    whole = posterior.predict(questions)
    alone = [posterior.predict([each]).probabilities for each in questions]
    few = posterior.predict(questions, max_rows=3).probabilities
    turned = posterior.predict(questions[::-1]).probabilities.flip(0)
    for other in (few, turned):
        torch.testing.assert_close(other, whole.probabilities, atol=1e-5, rtol=1e-4)
    for row, each in zip(whole.probabilities, alone, strict=True):
        torch.testing.assert_close(each[0], row[: each.shape[1]], atol=1e-5, rtol=1e-4)
    two_choices = posterior.predict(questions[1:2]).epistemic  # beside none that has three
    torch.testing.assert_close(two_choices, whole.epistemic[1:2], atol=1e-6, rtol=1e-3)


def test_fits_under_an_earlier_posterior_start_at_its_mean_and_so_are_alike() -> None:
    """At all sites: with other LoRA A its B would make another product."""
    model = tiny_model(bh.presets.lora(rank=2))
    old = bh.fit(model, "laplace", tiny_examples(), components=1, **QUICK)
    again = bh.Model(old.model.network, old.as_prior(), model.likelihood)
    with pytest.warns(UserWarning, match="components=2: all start at the mean of the prior"):
        new = bh.fit(again, "laplace", tiny_examples(seed=1), components=2, **QUICK)
    there = old.as_prior().moments()  # type: ignore[attr-defined]
    for part in new.components:
        for name, (mean, _) in part.model.prior.moments().items():  # type: ignore[attr-defined]
            torch.testing.assert_close(mean, there[name][0])
