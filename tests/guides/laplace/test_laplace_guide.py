"""The Laplace guide: the exact posterior of a regression, draws, scales and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from exact import (
    Exact,
    dense,
    flat,
    hierarchical,
    own_network,
    random_ratings,
    random_texts,
    regression,
)
from laplace_fits import NOISE, PLAIN, QUICK, exactly, guide_of
from memory import Memory
from pyro.infer import SVI
from pyro.optim import Adam
from saves import load
from transformers import BertModel

import bhpeft_pyro as bh
from bhpeft_pyro.errors import GuideError
from bhpeft_pyro.guides import LaplaceGuide
from bhpeft_pyro.guides.laplace import curvature
from bhpeft_pyro.model import linearized
from bhpeft_pyro.model.likelihoods import HeteroscedasticNormal, Normal
from bhpeft_pyro.priors import FunctionSpaceNormal
from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("tau", [20.0, 0.05])
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
    noisy = guide.information.times(half).covariance(guide.first_scale, 2.0)
    expected = 2.0 * prior + 0.5 * (exact.precision - prior)
    torch.testing.assert_close(torch.linalg.inv(dense(noisy)), expected, rtol=1e-2, atol=1e-2)


def test_what_the_next_round_inherits_does_not_depend_on_tau(tmp_path: Path) -> None:
    """In single precision a covariance with a large tau has few digits of what data contributed."""

    def inherited(posterior: bh.Posterior) -> tuple[Any, Any]:
        guide = guide_of(posterior)
        covariance, first = guide.as_prior().normal.covariance, guide.first_scale.double()
        root = first.unsqueeze(-1) * covariance.precision_root()
        return (first / covariance.scale).square() - 1, root @ root.mT

    how: dict[str, Any] = {**QUICK, "components": 1, "temperature": 1.0}
    fits = [bh.fit(tiny_model(), "laplace", tiny_examples(64), tau=t, **how) for t in (1, 1e3, 1e5)]
    retuned, again = (load(fits[i].save(tmp_path / str(i))) for i in range(2))
    guide_of(retuned).retune(1e5)
    expected = inherited(fits[0])
    for other in (*fits, retuned, again):
        for found, part in zip(inherited(other), expected, strict=True):
            assert ((found - part).abs().sum() / part.abs().sum()).item() < 1e-5


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


@pytest.mark.parametrize("likelihood", [None, Normal(0.5, 1.0)])
def test_the_prior_may_sample_the_sites_in_any_order(likelihood: Any) -> None:
    """A mapping samples the sites of a ready prior first."""
    rows = {"text": random_texts(60), "label": [i % 2 for i in range(60)]}
    ready, same = bh.priors.FunctionSpaceNormal(head=1.0), lambda site: dist.Normal(0.0, site.unit)
    found = []
    for prior in ({"*": ready}, {"*.weight": same, "*": ready}):
        model = tiny_model((), 2 if likelihood is None else 1, prior, likelihood)
        found.append(bh.fit(model, "laplace", rows, components=1, max_steps=20, **PLAIN))
    one, other = (guide_of(each).scales() for each in found)
    assert [*one] == [*other]  # so that a later round's prior may sample them in another order
    torch.testing.assert_close(other, one, rtol=1e-3, atol=0.0)
    a, b = (each.predict(rows["text"]).epistemic for each in found)
    torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-6)


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
    torch.testing.assert_close(one.guide.state_dict(), other.guide.state_dict())
    for one, other in zip(*(each.as_prior().moments().values() for each in both), strict=True):  # type: ignore[attr-defined]
        torch.testing.assert_close(one, other)
    again = guide_of(first.widen(tiny_examples(80)))
    torch.testing.assert_close(again.loc, guide.loc)
    chosen = first.update(tiny_examples(9, seed=1), validation=tiny_examples(40, seed=2), **QUICK)
    assert chosen.report.output_scale != 1


def test_only_a_softmax_has_an_output_scale() -> None:
    """The cutpoints of ordered classes would have to be scaled too."""
    likelihood = bh.likelihoods.OrderedLogistic(2)
    model = tiny_model(bh.presets.bh_peft(), likelihood.outputs, likelihood=likelihood)
    fitted = bh.fit(model, "laplace", tiny_examples(80), components=1, max_steps=60, **PLAIN)
    assert fitted.report.output_scale is None and guide_of(fitted).output_scale == 1
    assert "output scale" not in str(fitted.report)


@pytest.mark.parametrize("likelihood", [Normal(3.0, 2.0), HeteroscedasticNormal(3.0, 2.0)])
def test_the_mean_is_the_points(likelihood: Any) -> None:
    model = tiny_model(bh.presets.bh_peft(), likelihood.outputs, likelihood=likelihood)
    rows = {"text": random_texts(60), "label": [float(i % 5) for i in range(60)]}
    posterior = bh.fit(model, "laplace", rows, components=2, max_steps=10, progress=False)
    wide, point = (posterior.predict(rows, samples) for samples in (None, 0))
    assert isinstance(wide, bh.forecast.RatingForecast) and isinstance(
        point, bh.forecast.RatingForecast
    )
    torch.testing.assert_close(wide.mean, point.mean, atol=1e-5, rtol=1e-5)
    if isinstance(likelihood, Normal):
        assert wide.within is not None and (wide.within > 0).all()
        assert (wide.epistemic - wide.between - wide.within.mean(0)).abs().max() < 1e-6


def test_it_is_trained_by_hand_with_svi_and_then_measured() -> None:
    model, rows = tiny_model(()), tiny_examples(24)
    guide = bh.autoguide("laplace", model)
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


def test_what_cannot_work_is_refused() -> None:
    model = tiny_model(())
    guide = bh.autoguide("laplace", model)
    with pytest.raises(GuideError, match=r"no covariance yet.*widen"):
        guide.as_prior()
    with pytest.raises(GuideError, match="also samples tau"):
        bh.autoguide("laplace", tiny_model((), prior=hierarchical))


def wide_model() -> bh.Model:
    config = tiny_backbone().config
    config.hidden_size = 256
    head = bh.Head(3, principal=False)
    network = bh.RandomPEFT(BertModel(config), bh.presets.lora(rank=8), head, tiny_tokenizer())
    return bh.Model(network, FunctionSpaceNormal(change=0.1, head=1.0))


@pytest.mark.parametrize("rank", [16, 64])
def test_the_page_says_what_is_held_while_a_width_is_measured(rank: int) -> None:
    """By the training rows, and chosen by held-out ones; the formula of docs/backbones.md."""
    model = wide_model()
    texts = tiny_examples(160).texts
    rows = {"text": list(texts or ()), "label": [i % 3 for i in range(160)]}
    examples = bh.data.encode(rows, model.network.tokenizer, kind="class")
    guide = LaplaceGuide(model, rank)
    size = 4 * len(guide.loc) * (5 + 4 * rank + 256 + 15 * 16 + 256)
    with Memory() as memory:
        learnt, held_out = examples.subset(range(128)), examples.subset(range(128, 160))
        guide.compute_width(model, learnt, held_out, bh.FitOptions())
    kept = 2 * sum(buffer.nbytes for buffer in guide.buffers()) + 16 * len(guide.loc)
    assert guide.covariance.rank == rank
    assert kept + memory.peak <= size + 2**23 < 2 * (kept + memory.peak)


def test_with_many_weights_fewer_gradients_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the covariance is nearly the same."""
    found = []
    for limit in (2**31, 2**19):
        for module in (linearized, curvature):
            monkeypatch.setattr(module, "AT_ONCE", limit)
        model = wide_model()
        guide = LaplaceGuide(model, rank=4)
        with Memory() as memory:
            guide.compute_width(model, tiny_examples(40), None, bh.FitOptions(tau=1.0))
        found.append((memory.peak, guide.covariance.variance))
    (peak, variance), (less, other) = found
    assert less < 0.5 * peak
    assert (variance.log() - other.log()).abs().max() < 0.1
