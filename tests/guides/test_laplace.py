"""Laplace approximations of the linearised network, against closed forms and brute force."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from counts import COUNTS, Counts
from exact import (
    Exact,
    KnownNoise,
    dense,
    flat,
    hierarchical,
    own_network,
    random_ratings,
    random_texts,
    regression,
)
from linearised import centred, derivative
from pyro.infer import SVI
from pyro.optim import Adam
from saves import load
from torch import Tensor

import bhpeft_pyro as bh
from bhpeft_pyro.base.threads import seeded
from bhpeft_pyro.data.batch import Batch
from bhpeft_pyro.diagnostics import psis
from bhpeft_pyro.diagnostics.changes import shifts
from bhpeft_pyro.errors import DataError, GuideError
from bhpeft_pyro.guides import LaplaceGuide, MixtureGuide
from bhpeft_pyro.guides.laplace import choice as candidates
from bhpeft_pyro.guides.laplace import curvature, laplace_strategy
from bhpeft_pyro.guides.laplace.choice import Candidates
from bhpeft_pyro.guides.laplace.curvature import Curvature, Precision, jacobians
from bhpeft_pyro.model import linearized
from bhpeft_pyro.model.likelihoods import HeteroscedasticNormal, Normal
from bhpeft_pyro.model.linearized import LinearOutputs, jacobian, symmetric_noise
from bhpeft_pyro.peft.sites import Site
from bhpeft_pyro.posterior.mixture import MixturePosterior
from bhpeft_pyro.priors import JointPrior
from bhpeft_pyro.testing import tiny_examples, tiny_model

NOISE = 2.0
FIT: dict[str, Any] = {
    "max_steps": 150,
    "batch_size": 64,
    "lr": 0.1,
    "temperature": 1.0,
    "tau": 1.0,
    "progress": False,
}
PLAIN: dict[str, Any] = {"progress": False}
QUICK: dict[str, Any] = {"max_steps": 3, **PLAIN}


def guide_of(posterior: bh.Posterior) -> LaplaceGuide:
    assert isinstance(posterior.guide, LaplaceGuide)
    return posterior.guide


def exactly(
    model: bh.Model, examples: bh.data.Examples, rank: int | None = None, **options: Any
) -> bh.Posterior:
    """With as many directions as there are weights, unless a rank is given."""
    rank = rank or sum(site.numel for site in model.sites)
    guide = bh.autoguide("laplace", model, components=1, rank=rank)
    return bh.fit(model, guide, examples, **{**FIT, **options})


def held_out_nll(exact: Exact, mean: Tensor, new: Exact, tau: float) -> float:
    """Of new rows, with `tau` times the prior's precision in the width; the mean stays."""
    wide = Exact(exact.x, exact.y, exact.prior_sd / tau**0.5, exact.noise)
    variance = (new.x @ wide.covariance * new.x).sum(1) + exact.noise**2
    normal = torch.distributions.Normal(new.x @ mean, variance.sqrt())
    return -normal.log_prob(new.y).mean().item()


@pytest.mark.parametrize("tau", [1.0, 20.0, 0.05])
def test_it_is_the_exact_posterior_of_a_regression_in_both_rounds(tau: float) -> None:
    """The mean, the precision, and two rounds against one fit of all data; tau times the first
    prior is in the width, and goes no further."""
    model = regression(own_network(), noise=NOISE)
    parts = [random_ratings(model, 64, 3), random_ratings(model, 48, 4)]
    first = exactly(model, parts[0], tau=tau)
    second = first.update(parts[1], tau=None)  # the width's tau stays
    for fitted, known in ((first, parts[0]), (second, parts[0].concat(parts[1]))):
        exact, guide = Exact.of(model, known), guide_of(fitted)
        mean = flat(guide.means())
        assert ((mean - exact.mean) / exact.sd).abs().max() < 0.05
        own = exact.precision + (tau - 1) * torch.eye(len(mean)) / exact.prior_sd**2
        precision = torch.linalg.inv(dense(guide.covariance))
        torch.testing.assert_close(precision, own, rtol=1e-2, atol=1e-2)
        carried = torch.linalg.inv(dense(guide.as_prior().normal.covariance))
        torch.testing.assert_close(carried, exact.precision, rtol=1e-2, atol=1e-2)
    drawn = flat(first.sample(800))
    assert (drawn.std(0) / guide_of(first).covariance.variance.sqrt()).log().abs().max() < 0.1


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
    second = first.update(parts[1], temperature=temperature, max_steps=1000, lr=0.3)
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
    long: dict[str, Any] = {"temperature": None, "max_steps": 600}
    own = first.update(parts[1], prior=dist.Normal(0.0, new.prior_sd), **long)
    for later in (first.update(parts[1], keep=0.0, **long), own):
        assert later.report.temperature == 1
        assert ((flat(guide_of(later).means()) - new.mean) / new.sd).abs().max() < 0.05
    assert "prior: your own in place of the last posterior" in str(own.report)
    third = own.update(parts[2])
    both = Exact.of(model, parts[1].concat(parts[2]))
    assert ((flat(guide_of(third).means()) - both.mean) / both.sd).abs().max() < 0.05
    quick: dict[str, Any] = {"temperature": None, "max_steps": 1}
    few = exactly(model, parts[0], rank=2)  # what it has learnt is in the diagonal too
    assert few.update(parts[1], prior=few.as_prior(), **quick).report.temperature == 1
    unknown = first.replace(first_prior=None)
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
    mean, taus = flat(guide_of(posterior).means()), candidates.TAUS.tolist()
    nlls = {tau: held_out_nll(exact, mean, new, tau) for tau in taus}
    best = min(nlls, key=nlls.__getitem__)
    (chosen,) = [tau for tau in taus if tau == pytest.approx(posterior.report.tau)]
    assert nlls[chosen] == pytest.approx(nlls[best], abs=5e-3)
    assert posterior.report.component_nll == pytest.approx(nlls[chosen], abs=0.02)
    assert nlls[1.0] > nlls[best] + 0.02  # and it is not what was given


def test_logistic_regression_has_its_gauss_newton_posterior() -> None:
    """P + sum (diag p - p p') (x) x x', with the prior's own P."""
    prior = bh.priors.FunctionSpaceNormal(head=1.5)
    model = tiny_model((), outputs=3, prior=prior)
    examples = tiny_examples(12)
    posterior = exactly(model, examples, max_steps=20)
    guide = guide_of(posterior)
    x = model.network.features(next(examples.batches(12))).double()
    weights = guide.means()
    logits = x @ weights["head.weight"].T.double() + weights["head.bias"].double()
    p = logits.softmax(-1)
    curvature = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    ones = torch.cat([x, torch.ones(12, 1)], 1).double()
    full = torch.einsum("nab,nc,nd->acbd", curvature, ones, ones)  # (3, 17, 3, 17)
    order = [*range(17)]
    flat_of = torch.tensor([a * 17 + c for a in range(3) for c in order[:-1]] + [16, 33, 50])
    gauss = full.reshape(51, 51)[flat_of][:, flat_of]
    own = 1 / guide.prior.covariance.scale.double().square()
    expected = torch.linalg.inv(gauss + own.diag())
    torch.testing.assert_close(dense(guide.covariance), expected, rtol=1e-3, atol=1e-4)


def test_low_rank_keeps_what_data_say_and_the_diagonal_of_the_rest() -> None:
    """Against the exact precision: the same diagonal, and nearly the same predictive variance."""
    model = regression(own_network(), noise=0.5)
    examples = random_ratings(model, 64, 3)
    full, few = (exactly(model, examples, rank) for rank in (None, 4))
    precisions = [torch.linalg.inv(dense(guide_of(each).covariance)) for each in (full, few)]
    torch.testing.assert_close(
        precisions[1].diagonal(), precisions[0].diagonal(), rtol=1e-2, atol=1e-1
    )
    unseen = random_texts(40, seed=9)
    one, other = (each.predict(unseen, 4000).epistemic.sqrt() for each in (full, few))
    assert (other / one).log().abs().mean() < 0.5


def test_every_site_moves_the_outputs_alike_under_the_default_prior() -> None:
    """By brute force: the variance of the linearised outputs, site by site."""
    model = tiny_model(bh.presets.lora(rank=2), outputs=3)
    guide = LaplaceGuide(model)
    with torch.no_grad():
        guide.loc.add_(0.3 * torch.randn(guide.loc.shape, generator=generator(1)))
    examples = tiny_examples(16)
    scale = laplace_strategy.equal_effect(model, guide, jacobians(model, guide.means(), examples))
    batch = next(examples.batches(len(examples)))
    rows = centred(model, derivative(model, guide.means(), batch)[1], batch)
    effects = {  # two contrasts between three outputs
        name: part.square().sum((1, 2)).mean().item() / 2
        for name, part in ((n, (rows * scale)[..., at]) for n, at in places(guide).items())
    }
    assert len(effects) == len(model.sites)
    for effect in effects.values():
        assert effect == pytest.approx(1 / len(effects), rel=1e-3)


@pytest.mark.parametrize("tau", [1.0, 7.0])
def test_every_round_sets_open_scales_again_and_keeps_what_was_learnt(tau: float) -> None:
    """The precision is tau times that of scales of equal effect at the new point estimate, plus the
    information of both rounds, by brute force; a prior that is given stays as it is."""
    parts = [tiny_examples(24, seed=seed) for seed in (0, 1)]
    options: dict[str, Any] = {"tau": tau, "temperature": 1.0, "lr": 0.1}

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
        assert guide.open == (prior is None)
        fresh = LaplaceGuide(
            model.with_prior(given), len(guide.loc)
        )  # the second round's information alone
        fresh.move(guide.means())
        fresh.strategy.compute_width(
            model.with_prior(given), parts[1], None, bh.FitOptions(tau=tau)
        )
        both = learnt(old) + learnt(fresh)
        torch.testing.assert_close(learnt(guide), both, rtol=2e-2, atol=2e-2)
        scale = guide.first_scale
        if prior is None:
            rows = jacobians(second.model, guide.means(), parts[1])
            scale = laplace_strategy.equal_effect(second.model, guide, rows)
            assert not torch.allclose(scale, old.first_scale, rtol=0.01)
        torch.testing.assert_close(guide.first_scale, scale)
        known = second.first_prior
        assert isinstance(known, JointPrior)
        torch.testing.assert_close(known.normal.stddev, scale)
        torch.testing.assert_close(known.normal.loc, first.first_prior.normal.loc)  # type: ignore[union-attr]


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


def counted(outputs: Tensor) -> Any:
    return dist.Poisson(outputs[..., 0].exp())


def test_information_is_an_expectation_over_labels_where_it_has_no_closed_form() -> None:
    """P + sum rate x x', for counts; in the order of the weights."""
    model = tiny_model((), 1, likelihood=counted, prior=bh.priors.FunctionSpaceNormal(head=0.5))
    rows = {"text": random_texts(20), "label": [float(i % 4) for i in range(20)]}
    examples = model.encode(rows)
    guide = guide_of(exactly(model, examples, max_steps=20))
    x = model.network.features(next(examples.batches(20))).double()
    weights = guide.means()
    rates = (x @ weights["head.weight"].T.double() + weights["head.bias"].double()).exp()
    ones = torch.cat([x, torch.ones(20, 1)], 1).double()
    precision = (rates * ones).T @ ones + (guide.prior.covariance.scale.double() ** -2).diag()
    expected = torch.linalg.inv(precision)
    ratio = dense(guide.covariance).diagonal() / expected.diagonal()
    assert ratio.log().abs().max() < 0.1  # one label for each text gives 0.4


def test_a_choice_that_does_not_exist_is_no_output() -> None:
    """Questions of two choices have one contrast each, whatever others share their batch."""
    model = tiny_model((), 1, likelihood=bh.likelihoods.MultipleChoice())
    choices = [[f"w{k}" for k in range(5 + i, 7 + i + 2 * (i == 0))] for i in range(9)]
    rows = {"question": ["w9"] * 9, "choices": choices, "answer": [0] * 9}
    examples = model.encode(rows)
    guide = LaplaceGuide(model)
    scale = laplace_strategy.equal_effect(model, guide, jacobians(model, guide.means(), examples))
    variances = []
    for each in range(9):
        (batch,) = examples.subset([each]).batches(1)
        outputs = centred(model, derivative(model, guide.means(), batch)[1], batch)
        variances.append((outputs * scale).square().sum().item())
    contrasts = sum(map(len, choices)) - 9
    assert sum(variances) / contrasts == pytest.approx(1.0, rel=1e-3)


def test_all_gradients_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one output, more examples are run at once than of three."""
    model = tiny_model((), 1, likelihood=Normal(3.0, 2.0))
    examples = model.encode({"text": random_texts(64), "label": [float(i % 5) for i in range(64)]})
    for module in (linearized, curvature):
        monkeypatch.setattr(module, "AT_ONCE", 5760)
    guide = LaplaceGuide(model, rank=1)
    with warnings.catch_warnings(action="error"):  # torch would enlarge the table
        rows, scale = jacobians(model, guide.means(), examples), guide.prior.covariance.scale
        Curvature.of(rows, scale, guide.rank, model.network.outputs, weight=1.0)


@pytest.mark.parametrize("kept", [0, 256])
def test_a_width_is_the_same_whether_jacobians_are_kept_or_computed_again(
    kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = 0

    def counted(model: bh.Model, at: Any, batch: Batch) -> Any:
        nonlocal rows
        rows += len(batch)
        return jacobian(model, at, batch)

    model, examples = tiny_model(()), tiny_examples(80)
    posterior = bh.fit(model, "delta", examples, max_steps=2, progress=False)
    expected = posterior.widen(examples)
    monkeypatch.setattr(curvature, "jacobian", counted)
    monkeypatch.setattr(curvature, "rows_kept", lambda latents: kept)
    found = posterior.widen(examples)
    assert torch.equal(guide_of(found).scale, guide_of(expected).scale)
    assert found.report.expected_nll == expected.report.expected_nll
    # 64 rows are learnt and 16 held out; 32 of the first are used for the prior's scales, the
    # curvature and the expected NLL.
    assert rows == (80 if kept else 80 + 2 * 32)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def places(guide: LaplaceGuide) -> dict[str, Tensor]:
    return {k: v.flatten() for k, v in guide.unpack(torch.arange(len(guide.loc))).items()}


@pytest.mark.parametrize("noise", [0.2, 1.0])
def test_a_ratings_noise_is_the_best_for_held_out_rows(noise: float) -> None:
    """The closed form against a search over noise scales, tau by tau."""
    torch.manual_seed(1)
    model = tiny_model((), 1, likelihood=Normal(3.0, 2.0))
    taus = torch.logspace(-2, 2, 5, dtype=torch.float64)
    log_scale = torch.tensor(0.3).log()
    mean = torch.cat([torch.randn(30, 1), log_scale.expand(30, 1)], 1)
    outputs = LinearOutputs(model, mean, (1,), None)
    labels = 3.0 + 2.0 * mean[:, 0] + noise * torch.randn(30)
    found = [[torch.diag_embed(torch.rand(30, 2).double() / tau)] for tau in taus]
    unit = model.likelihood.unit
    choice = candidates.with_constant_noise(
        taus, found, [(outputs, labels)], unit, free=True
    ).best()
    trained = 2.0 * 0.3
    errors = (labels - 3.0 - 2.0 * mean[:, 0]).double()
    nlls = {}
    for tau, each in zip(taus.tolist(), found, strict=True):
        for sd in torch.logspace(-1.5, 1, 2000, dtype=torch.float64).tolist():
            variance = sd**2 * (1 + 4.0 * each[0][:, 0, 0] / trained**2)
            nll = 0.5 * (errors.square() / variance + (2 * math.pi * variance).log()).mean()
            nlls[tau, sd] = nll.item()
    tau, sd = min(nlls, key=nlls.__getitem__)
    assert choice.noise * trained == pytest.approx(sd, rel=5e-3)
    assert choice.tau * choice.noise**2 == pytest.approx(tau)
    assert choice.nll == pytest.approx(nlls[tau, sd], abs=1e-4)


def test_a_noise_by_text_is_the_best_for_held_out_rows() -> None:
    """A search over noise scales, against the closed form where the noise is that of all texts,
    and against a loop over draws where it is not."""
    torch.manual_seed(1)
    labels, taus = 3.0 + 2.0 * torch.randn(40), torch.logspace(-1, 3, 5, dtype=torch.float64)
    sds = torch.rand(40, 3, 1).double()

    def candidates_of(likelihood: Any, own: float, by_text: float) -> Candidates:
        model = tiny_model((), likelihood.outputs, likelihood=likelihood)
        others = [by_text * torch.randn(40, 1)] if likelihood.outputs == 2 else []
        mean = torch.cat([torch.zeros(40, 1), *others, torch.full((40, 1), own)], 1)
        outputs = LinearOutputs(model, mean, (likelihood.outputs,), None)
        size = mean.shape[1]
        root = torch.cat([sds[:, :1], by_text * sds[:, 1:size]], 1)
        found = [[root @ root.mT / tau] for tau in taus]
        held = [(outputs, labels)]
        if likelihood.constant_noise:
            return candidates.with_constant_noise(taus, found, held, 2.0, free=True)
        made = candidates.with_noise_by_text(taus, found, held)
        index = 3
        with seeded(0):
            noise = symmetric_noise(candidates.DRAWS, size)
        factor = made.noises[index].item()
        densities = []
        for each in outputs.draws(found[index][0], noise):
            away = (each - mean) * torch.tensor([factor] * (size - 1) + [1.0])
            values = mean + away
            values[:, -1] += math.log(factor)
            densities.append(outputs.labels(values).log_prob(labels).double())
        brute = torch.stack(densities).logsumexp(0) - math.log(len(densities))
        torch.testing.assert_close(made.log_densities[index, 0], brute, rtol=1e-4, atol=1e-4)
        return made

    exact = candidates_of(Normal(3.0, 2.0), 0.5, 0.0)
    searched = candidates_of(HeteroscedasticNormal(3.0, 2.0), 0.5, 0.0)
    step = (candidates.NOISES[1] / candidates.NOISES[0]).item()
    ratio = searched.noises / exact.noises
    assert ((step**-0.6 < ratio) & (ratio < step**0.6)).all()
    for one, other in (
        (searched.log_densities, exact.log_densities),
        (searched.point, exact.point),
    ):
        torch.testing.assert_close(one.mean(-1), other.mean(-1), rtol=5e-3, atol=5e-3)
    assert candidates_of(HeteroscedasticNormal(3.0, 2.0), 0.5, 0.7).noises.unique().numel() > 1
    narrow = candidates_of(HeteroscedasticNormal(3.0, 2.0), -4.0, 0.0)  # all of it memorised
    assert narrow.point.mean().item() == pytest.approx(exact.point.mean().item(), abs=5e-3)


def test_a_width_never_costs_more_than_a_thousandth_or_three() -> None:
    """Where the point is right and sure of all, any width does harm."""
    model = tiny_model((), prior=bh.priors.FunctionSpaceNormal(head=30.0))
    examples, held_out = tiny_examples(48), tiny_examples(40, seed=3)
    posterior = exactly(
        model, examples, max_steps=400, lr=0.5, temperature=0.0, tau=None, validation=held_out
    )
    report = posterior.report
    assert report.point_nll is not None and report.component_nll is not None
    assert report.component_nll <= report.point_nll + 0.003 * abs(report.point_nll) + 1e-6
    taus = torch.tensor([0.01, 0.1, 1.0, 10.0, 100.0], dtype=torch.float64)
    nlls = torch.tensor([3.0, 2.0, 1.002, 1.001, 1.0005], dtype=torch.float64)

    def best(nlls: Tensor, point: float = 1.0) -> float:
        of_point = torch.tensor([-point], dtype=torch.float64)
        one = torch.ones(1)
        return Candidates(taus, torch.ones(5), one, -nlls[:, None, None], of_point).best().tau

    assert best(nlls) == 1.0  # the widest that costs at most 0.3 %
    assert best(nlls.flip(0)) == 1.0  # but no wider than the prior
    nlls = torch.tensor([0.9, 0.8, 0.79, 0.7, 0.75], dtype=torch.float64)
    assert best(nlls) == 10.0  # or the best, if it is better than the point
    assert best(torch.full((5,), 0.7).double(), 0.7) == 1.0  # where nothing is learnt


@pytest.mark.parametrize("shift", [0.0, -0.35, 100.0])
def test_the_width_of_ratings_does_not_depend_on_their_unit(shift: float) -> None:
    """In another unit every NLL is larger by the same number."""
    taus = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    for nlls, of_point, best in (
        ([0.300, 0.302, 0.310], 0.35, 0.1),
        ([0.300, 0.3008, 0.310], 0.35, 1.0),
        ([0.36, 0.352, 0.3505], 0.35, 1.0),
    ):
        density = -(torch.tensor(nlls, dtype=torch.float64) + shift)[:, None, None]
        point = torch.tensor([-of_point - shift], dtype=torch.float64)
        one = Candidates(taus, torch.ones(3), torch.ones(1), density, point, ratings=True)
        assert one.best().tau == candidates.best_together([one])[0][0].tau == best


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


def test_the_widths_of_components_are_the_best_for_their_mixture() -> None:
    """Two components that lie apart say as much as the labels vary by that alone: each by itself
    wants to be wide, both together need not be."""
    generator = torch.Generator().manual_seed(0)
    labels = 1.2 * torch.randn(400, generator=generator, dtype=torch.float64)
    taus = candidates.TAUS
    sds = (0.1 + 1 / taus.sqrt()).unsqueeze(-1)

    def component(mean: float) -> Candidates:
        normal = torch.distributions.Normal(torch.tensor(mean, dtype=torch.float64), sds)
        density = normal.log_prob(labels)[:, None]
        return Candidates(taus, torch.ones(len(taus)), torch.ones(1), density, density[-1, 0])

    every = [component(-1.0), component(1.0)]
    alone = [each.best().tau for each in every]
    choices, point_nll, nll = candidates.best_together(every)
    densities = torch.cat([each.log_densities for each in every], 1)
    together = [*(math.log(2) - densities.logsumexp(1)).mean(1)]
    good = torch.stack(together) <= 1.001 * min(together)  # the nearest that is nearly the best
    brute = taus[int(good.nonzero()[0])].item()
    assert alone[0] == alone[1] < brute
    assert [choice.tau for choice in choices] == pytest.approx([brute, brute])
    assert nll <= 1.001 * min(together).item() and nll < point_nll


def outputs_of(values: Tensor) -> LinearOutputs:
    return LinearOutputs(tiny_model((), 3), values, (3,), None)


def test_the_output_scale_is_the_best_for_held_out_rows() -> None:
    """Outputs that should be three times as large, against a loop; and few rows hardly say so."""
    torch.manual_seed(0)
    values = torch.randn(400, 3)
    labels = dist.Categorical(logits=3 * values).sample()
    sd, taus = torch.eye(3).expand(400, 3, 3) * 0.1, torch.tensor([0.1, 1.0, 10.0]).double()
    held = [(outputs_of(values[:150]), labels[:150]), (outputs_of(values[150:]), labels[150:])]
    spreads = [[sd[:150] / tau, sd[150:] / tau] for tau in taus]
    found = candidates.of_draws(taus, spreads, held, scaled=True)
    scales = candidates.OUTPUT_SCALES
    with seeded(0):
        noise = symmetric_noise(candidates.DRAWS, 3)
    for tau, scale in ((0, 3), (1, 14), (2, 9)):
        drawn = outputs_of(scales[scale] * values).draws(scales[scale] ** 2 * sd / taus[tau], noise)
        chosen = drawn.softmax(-1).gather(-1, labels.expand(len(drawn), -1).unsqueeze(-1))
        expected = chosen.squeeze(-1).mean(0).log().double()
        torch.testing.assert_close(found.log_densities[tau, scale], expected, rtol=1e-3, atol=1e-3)
    of_point = dist.Categorical(logits=values).log_prob(labels).double()
    torch.testing.assert_close(found.point, of_point, rtol=1e-4, atol=1e-4)

    choice, plain = found.best(), candidates.of_draws(taus, spreads, held, scaled=False).best()
    assert choice.tau == plain.tau and plain.output_scale == 1.0  # the width is chosen without
    nlls = scales.log() ** 2 / 800 - found.log_densities[taus.tolist().index(choice.tau)].mean(-1)
    assert choice.output_scale == pytest.approx(scales[nlls.argmin()].item())
    assert choice.output_scale == pytest.approx(3.0, rel=0.3)
    assert choice.nll is not None and plain.nll is not None and choice.nll < plain.nll - 0.1
    assert choice.point_nll == plain.point_nll

    sure = [(outputs_of(values[:2]), values[:2].argmax(1))]  # both right: the larger the better
    few = candidates.of_draws(taus, [[sd[:2] / tau] for tau in taus], sure, scaled=True)
    assert few.best().output_scale < 3


def test_the_output_scales_of_components_are_the_best_for_their_mixture() -> None:
    """The mean of predictions that err apart is less certain than it should be."""
    torch.manual_seed(0)
    truth = 2 * torch.randn(2000, 3)
    labels = dist.Categorical(logits=truth).sample()
    taus, scales = torch.ones(1).double(), candidates.OUTPUT_SCALES

    def component(factor: float) -> Candidates:
        values = factor * (truth + 1.5 * torch.randn(2000, 3))
        held = [(outputs_of(values), labels)]
        return candidates.of_draws(taus, [[torch.zeros(2000, 3, 3)]], held, scaled=True)

    every = [component(factor) for factor in (0.5, 1.0, 1.0, 2.0)]
    alone = [scales.tolist().index(each.best().output_scale) for each in every]
    assert alone[0] > alone[1] > alone[3]
    together = []
    for shift in range(-4, 5):
        at = [each.log_densities[0, i + shift] for i, each in zip(alone, every, strict=True)]
        nll = (math.log(4) - torch.stack(at).logsumexp(0)).mean()
        costs = [scales[i + shift].log() ** 2 / 4000 for i in alone]
        together.append((nll + sum(costs) / 4).item())
    best = together.index(min(together)) - 4
    choices, point_nll, nll = candidates.best_together(every)
    assert best > 0
    for index, choice in zip(alone, choices, strict=True):
        assert choice.output_scale == pytest.approx(scales[index + best].item())
    assert nll == pytest.approx(min(together), abs=1e-3)
    points = torch.stack([each.point for each in every]).logsumexp(0)
    assert nll < point_nll == pytest.approx((math.log(4) - points).mean().item())


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
    nll = posterior.evaluate(held_out, samples=4000)["nll"]
    assert posterior.report.component_nll == pytest.approx(nll, abs=0.01)
    assert {each.report.output_scale for each in posterior.components} != {1.0}


def test_only_a_softmax_has_an_output_scale() -> None:
    """The cutpoints of ordered classes would have to be scaled too."""
    likelihood = bh.likelihoods.OrderedLogistic(2)
    model = tiny_model(bh.presets.bh_peft(), likelihood.outputs, likelihood=likelihood)
    fitted = bh.fit(model, "laplace", tiny_examples(80), components=1, max_steps=60, **PLAIN)
    assert fitted.report.output_scale is None and guide_of(fitted).output_scale == 1
    assert "output scale" not in str(fitted.report)


def test_the_output_scale_is_for_predictions_only(tmp_path: Path) -> None:
    """The next round learns from the weights as they were trained."""
    model = tiny_model(bh.presets.bh_peft())
    first = bh.fit(model, "laplace", tiny_examples(80), components=1, max_steps=60, **PLAIN)
    guide, scale = guide_of(first), first.report.output_scale
    assert scale is not None and scale != 1
    assert guide.output_scale.item() == pytest.approx(scale)
    assert f"output scale {scale:.3g}" in str(first.report)
    center = guide.unpack(guide.loc.detach())["head.weight"]
    torch.testing.assert_close(guide.means()["head.weight"], scale * center)
    first.save(tmp_path / "first")
    plain = load(tmp_path / "first")
    assert guide_of(plain).output_scale.item() == pytest.approx(scale)
    texts = random_texts(9)
    same = (each.predict(texts).probabilities for each in (plain, first))
    torch.testing.assert_close(next(same), next(same))
    guide_of(plain).retune(guide.tau.item(), output_scale=1.0)
    both = first, plain
    one, other = (each.update(tiny_examples(9, seed=1), **QUICK) for each in both)
    assert one.report.output_scale == other.report.output_scale == 1  # no rows choose it
    for name, value in one.guide.state_dict().items():
        torch.testing.assert_close(value, other.guide.state_dict()[name])
    one, other = (each.update(tiny_examples(9, seed=1), guide="normal", **QUICK) for each in both)
    for name, value in one.guide.means().items():
        torch.testing.assert_close(value, other.guide.means()[name])
    assert shifts(first) == shifts(plain)
    again = guide_of(first.widen(tiny_examples(80)))
    torch.testing.assert_close(again.loc, guide.loc)
    chosen = first.update(tiny_examples(9, seed=1), validation=tiny_examples(40, seed=2), **QUICK)
    assert chosen.report.output_scale != 1


def test_a_mixture_is_tuned_together_and_its_report_says_so() -> None:
    model = tiny_model(bh.presets.bh_peft())
    posterior = bh.fit(model, "laplace", tiny_examples(80), components=3, max_steps=30, **PLAIN)
    assert isinstance(posterior, MixturePosterior)
    report = posterior.report
    held_out = tiny_examples(80).hold_out(report.split or 0)[1]
    assert held_out is not None and report.component_nll is not None
    nll = posterior.evaluate(held_out)["nll"]
    assert report.component_nll == pytest.approx(nll, abs=0.01)
    assert f"mixture: held-out NLL {report.component_nll:.3f}" in str(report)
    for each in posterior.components:
        assert guide_of(each).tau.item() == pytest.approx(each.report.tau)
        assert guide_of(each).output_scale.item() == pytest.approx(each.report.output_scale)


def test_another_tau_and_noise_are_those_of_a_new_measurement() -> None:
    model = regression(own_network(), noise=NOISE)
    examples = random_ratings(model, 32, 3)
    guide, other = (guide_of(exactly(model, examples, tau=tau)) for tau in (1.0, 30.0))
    exact = Exact.of(model, examples)
    guide.retune(30.0)
    torch.testing.assert_close(
        dense(guide.covariance), dense(other.covariance), rtol=1e-3, atol=1e-5
    )
    prior = torch.eye(len(guide.loc)).double() / exact.prior_sd**2
    half = torch.full_like(guide.loc, 0.5)
    noisy = Precision(guide.covariance, guide.first_scale, 30.0).at(2.0, half)
    expected = 2.0 * prior + 0.5 * (exact.precision - prior)
    torch.testing.assert_close(torch.linalg.inv(dense(noisy)), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("likelihood", [Normal(), HeteroscedasticNormal()])
def test_another_noise_scale_says_as_much_about_itself(likelihood: Any) -> None:
    """The Fisher information of a log scale is 2 for each example, whatever the scale is. With a
    factor for each text, the scale and the factors' bias count as known to each other."""
    rows = {"text": random_texts(60), "label": [float(i % 5) for i in range(60)]}
    model = tiny_model((), likelihood.outputs, likelihood=likelihood)
    fitted = bh.fit(model, "laplace", rows, components=1, **QUICK)
    guide = guide_of(fitted)
    own = torch.diag(guide.prior.covariance.scale.double() ** -2)
    first = torch.linalg.inv(dense(guide.as_prior().normal.covariance)) - own
    guide.retune(0.1, 0.5)
    second = torch.linalg.inv(dense(guide.as_prior().normal.covariance)) - own
    for learnt in (first, second):
        assert learnt[-1, -1].item() == pytest.approx(2 * fitted.report.examples, rel=1e-3)
        assert learnt[-1, :-1].abs().max() < 1e-2
    torch.testing.assert_close(second[:-1, :-1], 4 * first[:-1, :-1], rtol=1e-2, atol=1e-2)


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
    assert fitted.report.component_nll == pytest.approx(fitted.evaluate(held_out)["nll"], rel=1e-3)
    assert fitted.report.noise == pytest.approx(3.0, rel=0.3)


def test_the_noise_is_chosen_with_the_width_of_the_first_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Later rounds have information of earlier noise scales."""
    free: list[bool] = []

    def chosen(*args: Any) -> Candidates:
        free.append(args[-1])
        return candidates.with_constant_noise(*args)

    monkeypatch.setattr(laplace_strategy, "with_constant_noise", chosen)
    rows = {"text": random_texts(60), "label": [float(i % 5) for i in range(60)]}
    model = tiny_model(bh.presets.bh_peft(), 1, likelihood=Normal())
    first = bh.fit(model, "laplace", rows, components=1, **QUICK)
    new = {"text": random_texts(90)[60:], "label": [float(i % 3) for i in range(30)]}
    others = {"text": random_texts(120)[90:], "label": new["label"]}
    first.update(new, validation=others, max_steps=3)
    assert free == [True, False]


def test_a_later_rounds_width_is_chosen_by_the_forecasts_that_it_makes() -> None:
    rows = {"text": random_texts(60), "label": [float(i % 5) for i in range(60)]}
    model = tiny_model((), 1, likelihood=Normal())
    first = bh.fit(model, "normal", rows, max_steps=40, progress=False)
    texts, labels = random_texts(120)[60:], [float(i % 3) for i in range(30)]
    new, others = ({"text": part, "label": labels} for part in (texts[:30], texts[30:]))
    second = first.update(new, guide="laplace", validation=others, max_steps=20)
    assert second.report.component_nll == pytest.approx(second.evaluate(others)["nll"], rel=5e-3)


class Constant(KnownNoise):
    """It says that predictions have a closed form, and has no noise scale to learn."""

    constant_noise = True


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


@pytest.mark.parametrize("likelihood", [None, Normal(0.5, 1.0)])
def test_the_prior_may_sample_the_sites_in_any_order(likelihood: Any) -> None:
    """A mapping samples the sites of a ready prior first."""
    rows = {"text": random_texts(60), "label": [i % 2 for i in range(60)]}
    ready, same = bh.priors.FunctionSpaceNormal(), lambda site: dist.Normal(0.0, site.unit)
    found = []
    for prior in ({"*": ready}, {"*.weight": same, "*": ready}):
        model = tiny_model((), 2 if likelihood is None else 1, prior, likelihood)
        found.append(bh.fit(model, "laplace", rows, components=1, max_steps=20, **PLAIN))
    one, other = (guide_of(each).scales() for each in found)
    assert [*one] == [*other]  # so that a later round's prior may sample them in another order
    for name, sd in one.items():
        torch.testing.assert_close(other[name], sd, rtol=1e-3, atol=0.0)
    a, b = (each.predict(rows["text"]).epistemic for each in found)
    torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("likelihood", [Normal(3.0, 2.0), HeteroscedasticNormal(3.0, 2.0)])
def test_the_mean_is_the_points(likelihood: Any) -> None:
    model = tiny_model(bh.presets.bh_peft(), likelihood.outputs, likelihood=likelihood)
    rows = {"text": random_texts(60), "label": [float(i % 5) for i in range(60)]}
    posterior = bh.fit(model, "laplace", rows, components=3, max_steps=20, progress=False)
    wide, point = (posterior.predict(rows, samples) for samples in (None, 0))
    assert isinstance(wide, bh.forecast.RatingForecast) and isinstance(
        point, bh.forecast.RatingForecast
    )
    torch.testing.assert_close(wide.mean, point.mean, atol=1e-5, rtol=1e-5)
    if isinstance(likelihood, Normal):
        assert wide.within is not None and (wide.within > 0).all()
        assert (wide.epistemic - wide.between - wide.within.mean(0)).abs().max() < 1e-6


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


def test_a_fit_under_an_earlier_posterior_starts_at_its_mean() -> None:
    """At all sites: with other LoRA A its B would make another product."""
    model = tiny_model(bh.presets.lora(rank=2))
    old = bh.fit(model, "laplace", tiny_examples(), components=1, **QUICK)
    again = bh.Model(model.network, old.as_prior(), model.likelihood)
    new = bh.fit(again, "laplace", tiny_examples(seed=1), components=1, **QUICK)
    there = old.as_prior().moments()  # type: ignore[attr-defined]
    for name, (mean, _) in new.model.prior.moments().items():  # type: ignore[attr-defined]
        torch.testing.assert_close(mean, there[name][0])


def test_widening_points_is_fitting_the_default() -> None:
    """The same points, so the same posterior; and their predictions stay."""
    rows = tiny_examples(80)
    points = bh.fit(tiny_model(), "delta", rows, components=2, max_steps=20, progress=False)
    fitted = bh.fit(tiny_model(), "laplace", rows, components=2, max_steps=20, progress=False)
    wide = points.widen(rows)
    unseen = tiny_examples(30, seed=5)
    assert wide.report.held_out == fitted.report.held_out == 16
    one, other = (each.predict(unseen) for each in (wide, fitted))
    torch.testing.assert_close(one.probabilities, other.probabilities, atol=2e-3, rtol=2e-2)
    assert torch.equal(*(each.predict(unseen, 0).probabilities for each in (points, wide)))
    assert wide.update(tiny_examples(12, seed=8), max_steps=3).report.parent == wide.report.id


def test_components_under_an_earlier_posterior_are_said_to_be_alike() -> None:
    old = bh.fit(tiny_model(), "laplace", tiny_examples(), components=1, **QUICK)
    with pytest.warns(UserWarning, match="components=2: all start at the mean of the prior"):
        again = bh.Model(old.model.network, old.as_prior())
        bh.fit(again, "laplace", tiny_examples(seed=1), components=2, **QUICK)


def test_widening_again_keeps_tau_and_loses_no_coreset() -> None:
    first = bh.fit(tiny_model(()), "laplace", tiny_examples(), components=1, tau=30.0, **QUICK)
    later = first.update(tiny_examples(seed=1), tau=None, **QUICK)
    wide = later.widen(tiny_examples(seed=1))
    assert later.report.tau == wide.report.tau == pytest.approx(30.0)
    sds = guide_of(later).scales()
    for name, sd in guide_of(wide).scales().items():
        torch.testing.assert_close(sd, sds[name], rtol=1e-2, atol=0.0)
    kept = first.update(tiny_examples(seed=1), replay=3, **QUICK).update(
        tiny_examples(seed=2), replay=3, **QUICK
    )
    with pytest.raises(GuideError, match="kept earlier examples for replay"):
        kept.widen(tiny_examples(seed=2))


def test_widening_again_keeps_the_rank_and_the_prior() -> None:
    """The initial values at which `fit` centred the prior are known then."""
    rows = tiny_examples(24)
    model = tiny_model(bh.presets.lora(rank=1))
    guide = bh.autoguide("laplace", model, components=1, rank=3)
    fitted = bh.fit(model, guide, rows, **QUICK)
    wide = fitted.widen(rows)
    assert guide_of(wide).rank == guide_of(fitted).rank == 3
    for name, (mean, _) in fitted.model.prior.moments().items():  # type: ignore[attr-defined]
        torch.testing.assert_close(wide.model.prior.moments()[name][0], mean)  # type: ignore[attr-defined]
    assert wide.report.kl["weights"] == pytest.approx(fitted.report.kl["weights"], rel=1e-3)


def test_widening_keeps_the_rounds_before_and_no_metric_of_the_points(tmp_path: Path) -> None:
    first = bh.fit(tiny_model(()), "delta", tiny_examples(), components=2, **QUICK)
    second = first.update(tiny_examples(seed=1), prior=bh.priors.default(), **QUICK)
    second.components[0].report.metrics["held_out/nll"] = 0.5
    wide = second.widen(tiny_examples(seed=1))
    wide.save(tmp_path)
    for found in (wide, load(tmp_path)):
        assert [each.id for each in found.lineage[:-1]] == [first.report.id]
        assert found.report.parent == first.report.id
        assert [len(part.lineage) for part in found.components] == [2, 2]
        assert found.components[0].report.metrics == {}
    history = bh.streams.History(tmp_path / "history")
    ids = [history.add(each) for each in (second.components[0], wide.components[0])]
    assert {*history.leaves} == {*ids} and len({*ids}) == 2


def test_widening_in_a_later_round_leaves_the_first_prior_what_it_was() -> None:
    points = bh.fit(tiny_model(()), {"*": ("delta", {"width": 0.01})}, tiny_examples(), **QUICK)
    later = points.update(tiny_examples(seed=1), **QUICK)
    wide = later.widen(tiny_examples(seed=1))
    assert wide.first_prior is later.first_prior is points.model.prior
    for site in wide.model.sites:
        first = guide_of(wide).unpack(guide_of(wide).first_scale)[site.name]
        torch.testing.assert_close(first, bh.priors.default().sd(site).expand(site.shape))
    anew = wide.update(tiny_examples(seed=2), keep=0.0, **QUICK)
    sds = anew.model.prior.moments()["head.weight"][1]  # type: ignore[attr-defined]
    assert (sds > 0.1).all()  # as wide as the first prior, where the round's own had 0.0025


def test_it_is_trained_by_hand_with_svi_and_then_measured() -> None:
    model, rows = tiny_model(()), tiny_examples(24)
    guide = bh.autoguide("laplace", model, components=1)
    svi = SVI(model, guide, Adam({"lr": 0.1}), bh.training.ELBO())
    batch = next(rows.batches(len(rows)))
    losses = [svi.step(batch) for _ in range(40)]
    assert losses[-1] < losses[0]
    posterior = bh.Posterior(model, guide, (bh.training.FitReport(24, "", bh.FitOptions()),)).widen(
        rows
    )
    assert guide_of(posterior).linear and not guide.linear
    here, there = (each.means() for each in (guide, guide_of(posterior)))
    assert all(torch.equal(here[name], there[name]) for name in here)


def test_outcomes_that_are_drawn_are_the_same_ones_again() -> None:
    """Those of a likelihood of one's own; the global random state is left alone."""
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        model = tiny_model((), outputs=1, likelihood=Counts())
        found.append(bh.fit(model, "laplace", COUNTS, components=1, **QUICK))
        assert torch.equal(torch.get_rng_state(), before)
    one, other = (guide_of(posterior).scales() for posterior in found)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_cannot_work_is_refused() -> None:
    model = tiny_model(())
    guide = bh.autoguide("laplace", model, components=1)
    with pytest.raises(GuideError, match=r"no covariance yet.*widen"):
        guide.as_prior()
    with pytest.raises(GuideError, match="also samples tau"):
        bh.autoguide("laplace", tiny_model((), prior=hierarchical))
    with pytest.raises(GuideError, match=r"'laplace': it would take 34 latents.*max_bytes"):
        bh.autoguide("laplace", model, max_bytes=1000)
    with pytest.raises(GuideError, match="components=0 must be an integer of at least 1"):
        bh.autoguide("laplace", model, components=0)
    assert isinstance(bh.autoguide("laplace", model), MixtureGuide)
    normal = bh.fit(tiny_model(()), "normal", tiny_examples(), **QUICK)
    with pytest.raises(GuideError, match=r"widen: NormalGuide .* expected a 'delta' guide"):
        normal.widen(tiny_examples())
    points = bh.fit(tiny_model(()), "delta", tiny_examples(), **QUICK)
    with pytest.raises(DataError, match="column 'label' is missing"):
        points.widen(["w5 w9"])
