"""The linearised network against brute force, and its predictions."""

from __future__ import annotations

import copy
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from exact import dense
from linearised import Linearised, centred, derivative
from memory import Memory
from tiny import MODEL_TYPES, WITHOUT_PREFIX, build, drawn
from torch import Tensor

import bhpeft_pyro as bh
from bhpeft_pyro.base.distributions import Covariance
from bhpeft_pyro.guides import LaplaceGuide
from bhpeft_pyro.model import linearized as linear
from bhpeft_pyro.model.likelihoods import (
    Categorical,
    HeteroscedasticNormal,
    Likelihood,
    MultipleChoice,
    Normal,
    OrderedLogistic,
)
from bhpeft_pyro.model.linearized import jacobian, linear_predictives, normal_points
from bhpeft_pyro.prediction.draws import draw
from bhpeft_pyro.testing import tiny_batch, tiny_examples, tiny_model, tiny_tokenizer

Weights = dict[str, Tensor]
TEXTS = ["w9", "w5 w30 w12 w44 w17", "w6 w7", "w8 w40 w41 w42", "w21 w22 w23"]
QUESTIONS = [("w9 w10", ["w5", "w6 w7", "w8 w9 w11"]), ("w12", ["w5 w6", "w30"])]


def model_of(backbone: Any, kinds: Any) -> bh.Model:
    return bh.Model(bh.RandomPEFT(backbone, kinds, bh.Head(3), tiny_tokenizer()))


@pytest.mark.parametrize("kinds", [bh.presets.bh_peft(), bh.presets.mam(), bh.presets.unipelt()])
def test_the_jacobian_of_every_kind(kinds: Any) -> None:
    check_jacobian(tiny_model(kinds, 3))


@pytest.mark.parametrize("name", [name for name in MODEL_TYPES if name not in WITHOUT_PREFIX])
def test_the_jacobian_of_every_architecture(name: str) -> None:
    check_jacobian(model_of(build(name), bh.presets.bh_peft()))


def check_jacobian(model: bh.Model) -> None:
    at, batch = drawn(model.sites, seed=1), tiny_batch(3)
    outputs, rows = jacobian(model, at, batch)
    value, expected = derivative(model, at, batch)
    torch.testing.assert_close(outputs.mean, value, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(rows, centred(model, expected, batch), atol=1e-4, rtol=1e-3)


def posterior_of(likelihood: Likelihood) -> bh.Posterior:
    """A measured guide whose covariance has directions and a diagonal."""
    model = tiny_model(bh.presets.bh_peft(), likelihood.outputs or 3, likelihood=likelihood)
    guide = LaplaceGuide(model, rank=4)
    generator = torch.Generator().manual_seed(1)
    size = len(guide.loc)
    with torch.no_grad():
        guide.loc.add_(0.2 * torch.randn(size, generator=generator))
    axes = torch.linalg.qr(torch.randn(size, 4, generator=generator))[0]
    # A noise scale is taken at its mean in closed form: as data leave it, it is nearly known.
    noise = guide.at({site.name for site in likelihood.sites})
    scale = torch.where(noise, 0.01, guide.prior.covariance.scale)
    guide.set_covariance(Covariance(scale, axes, torch.tensor([0.1, 0.4, 0.7, 0.9])))
    return bh.Posterior(model, guide, ())


def parts_of(
    likelihood: Likelihood, data: Any
) -> tuple[bh.Posterior, bh.Model, LaplaceGuide, bh.data.Batch]:
    """`posterior_of`, its model and guide, and the data as one batch."""
    posterior = posterior_of(likelihood)
    assert isinstance(posterior.guide, LaplaceGuide)
    examples = posterior.encode(data, labelled=False)
    (batch,) = examples.batches(len(examples))
    return posterior, posterior.model, posterior.guide, batch


LIKELIHOODS: list[tuple[Likelihood, Any]] = [
    (Categorical(), TEXTS),
    (Normal(3.0, 2.0), TEXTS),
    (HeteroscedasticNormal(3.0, 2.0), TEXTS),
    (OrderedLogistic(4), TEXTS),
    (MultipleChoice(), QUESTIONS),
]


@pytest.mark.parametrize(("likelihood", "data"), LIKELIHOODS)
def test_the_outputs_covariance_is_j_s_j(likelihood: Likelihood, data: Any) -> None:
    """The likelihood's own weights, which outputs do not depend on, among them."""
    _, model, guide, batch = parts_of(likelihood, data)
    outputs, jacobians = jacobian(model, guide.means(), batch)
    found = guide.covariance.projected(jacobians)
    _, rows = derivative(model, guide.means(), batch)
    own = sum(site.numel for site in likelihood.sites)
    whole = dense(guide.covariance).float()
    size = len(guide.loc) - own
    per = centred(model, rows, batch)
    expected = per @ whole[:size, :size] @ per.mT
    count = per.shape[1]
    torch.testing.assert_close(found[:, :count, :count], expected, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(
        found[:, count:, count:], whole[size:, size:].expand(len(batch), own, own)
    )
    assert outputs.mean.shape == (len(batch), count + own)


def test_the_first_output_alone_has_the_first_row() -> None:
    _, model, guide, batch = parts_of(HeteroscedasticNormal(3.0, 2.0), TEXTS)
    outputs, whole = jacobian(model, guide.means(), batch)
    same, first = jacobian(model, guide.means(), batch, first=True)
    torch.testing.assert_close(first, whole[:, :1])
    torch.testing.assert_close(same.mean, outputs.mean)


@pytest.mark.parametrize("size", [1, 4, 8])
def test_points_of_a_normal_fill_it_evenly(size: int) -> None:
    """Their covariance is at least three times nearer to the Normal's than that of random pairs."""
    points = torch.stack([normal_points(256, size, seed).double() for seed in range(20)])
    assert points.mean(1).abs().max() < 1e-6  # by symmetry
    error = points.mT @ points / 256 - torch.eye(size)
    assert error.square().mean().sqrt() < 0.33 * 128**-0.5
    assert torch.equal(normal_points(256, size, 3).double(), points[3])
    assert not torch.equal(points[0], points[1])


@pytest.mark.parametrize("samples", [None, 200])
def test_the_epistemic_variance_of_ratings_is_that_of_their_mean(samples: int | None) -> None:
    """Of a likelihood of one's own, which is drawn; in closed form it is J S J'."""
    rows = {"text": TEXTS * 8, "label": [0.5 * (i % 5) for i in range(40)]}
    model = tiny_model((), 1, likelihood=lambda outputs: dist.Normal(outputs[..., 0], 1.0))
    posterior = bh.fit(model, "laplace", rows, components=1, max_steps=5, progress=False)
    guide: Any = posterior.guide
    batch = next(posterior.model.encode(rows).batches(40))
    _, derivatives = jacobian(posterior.model, guide.means(), batch)
    expected = guide.covariance.projected(derivatives)[:, 0, 0].detach()
    found = torch.as_tensor(posterior.predict(rows["text"], samples).epistemic)
    torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("likelihood", "data"), [LIKELIHOODS[0], LIKELIHOODS[-1]])
def test_an_output_scale_multiplies_the_outputs(likelihood: Likelihood, data: Any) -> None:
    """Those of every draw of the weights too, while the posterior that becomes a prior stays."""
    posterior, model, guide, batch = parts_of(likelihood, data)

    def found() -> tuple[Tensor, ...]:
        outputs, jacobians = jacobian(model, guide.means(), batch)
        plain = bh.Model(model.network)  # whose outputs are not compared by a softmax
        at, weights = guide.means(), draw(model, guide, 5, seed=7)
        linear = Linearised(plain, at)._linear(weights, batch)
        passed = guide.as_prior().normal
        kept = passed.loc, passed.covariance.scale
        return outputs.mean, linear, guide.covariance.projected(jacobians), *kept

    before = found()
    guide.retune(1.0, output_scale=2.5)
    factors = (2.5, 2.5, 2.5**2, *[1.0] * (len(before) - 3))
    for old, new, factor in zip(before, found(), factors, strict=True):
        torch.testing.assert_close(new, factor * old, atol=1e-4, rtol=1e-4)
    closed, drawn = (posterior.predict(data, 4000, keep_samples=kept) for kept in (False, True))
    one, other = closed.probabilities, drawn.probabilities  # type: ignore[union-attr]
    torch.testing.assert_close(one, other, atol=0.03, rtol=0.0)

    before = guide.loc.detach().clone()
    guide.move(guide.means())
    torch.testing.assert_close(guide.loc.detach(), before)
    prior = guide.as_prior()
    later = copy.deepcopy(guide)
    later.set_prior(model.with_prior(prior))
    found_prior = later.under_prior(model).prior
    assert isinstance(found_prior, bh.priors.JointPrior)
    means = torch.cat([v.flatten() for v in guide.means().values()])
    torch.testing.assert_close(found_prior.normal.loc, means)
    torch.testing.assert_close(dense(found_prior.normal.covariance), dense(guide.covariance))
    _, twin, _ = guide.target(model, 1.0, False)  # whose fit a diagnostic judges
    torch.testing.assert_close(torch.cat([v.flatten() for v in twin.means().values()]), before)
    torch.testing.assert_close(dense(twin.covariance), dense(guide.unscaled))  # type: ignore[arg-type]


@pytest.mark.parametrize(("likelihood", "data"), LIKELIHOODS)
def test_all_draws_at_once_are_the_draws_one_by_one(likelihood: Likelihood, data: Any) -> None:
    posterior, model, guide, batch = parts_of(likelihood, data)
    forecast = posterior.predict(data, 5, seed=7, keep_samples=True)
    weights = draw(model, guide, 5, seed=7)
    distribution = Linearised(model, guide.means()).predictive(weights, batch)
    rating = likelihood.kind == "rating"
    expected = (distribution.mean if rating else distribution.probs).detach()
    found = forecast.means if rating else forecast.samples  # type: ignore[union-attr]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    assert expected.std(0).max() > 0.01
    itself = model.predictive(weights, batch)  # the network, which is not linear
    theirs = (itself.mean if rating else itself.probs).detach()
    assert (theirs - found).abs().max() > 1e-3


@pytest.mark.parametrize(("likelihood", "data"), LIKELIHOODS)
def test_the_closed_form_is_what_many_weight_draws_say(likelihood: Likelihood, data: Any) -> None:
    posterior = posterior_of(likelihood)
    closed, drawn = (posterior.predict(data, 4000, keep_samples=kept) for kept in (False, True))
    if isinstance(closed, bh.forecast.RatingForecast):
        spread = closed.sd.max().item()
        torch.testing.assert_close(closed.mean, drawn.mean, atol=0.06 * spread, rtol=0.0)
        uncertain = [each.epistemic.sqrt() for each in (closed, drawn)]
        torch.testing.assert_close(*uncertain, atol=0.06 * spread, rtol=0.0)
        if likelihood.outputs == 1:  # or else draws have a noise of their own
            torch.testing.assert_close(closed.sd, drawn.sd, atol=0.06 * spread, rtol=0.0)
    else:
        torch.testing.assert_close(closed.probabilities, drawn.probabilities, atol=0.02, rtol=0.0)
        torch.testing.assert_close(closed.epistemic, drawn.epistemic, atol=0.02, rtol=0.0)


def test_the_cost_does_not_depend_on_the_number_of_draws() -> None:
    posterior = posterior_of(Categorical())
    passes: list[int] = []
    posterior.model.network.backbone.register_forward_hook(lambda *_: passes.append(1))
    for samples in (2, 4000):
        posterior.predict(TEXTS, samples)
    assert len(passes) == 2


def test_a_subclass_of_a_softmax_may_be_none() -> None:
    class Sigmoids(Categorical):
        def distribution(self, outputs: Any) -> Any:
            return dist.Categorical(probs=outputs.values.sigmoid())

    assert Categorical().softmax
    assert not Sigmoids().softmax


def test_the_weights_may_be_in_any_order() -> None:
    """The Jacobian's columns follow `at`, and draws predict the same."""
    model = tiny_model(outputs=1, likelihood=Normal())
    at, batch = drawn(model.sites, seed=1), tiny_batch(3)
    other = {name: at[name] for name in [model.sites[-1].name, *at]}
    rows, columns = jacobian(model, at, batch)[1], jacobian(model, other, batch)[1]
    assert next(iter(other)) == "noise.log_scale"
    torch.testing.assert_close(columns, rows.roll(1, -1))
    block = {name: value + torch.randn(4, 1, *value.shape) for name, value in at.items()}
    (a,), (b,) = (
        [of(batch) for _, of in linear_predictives(model, x, [block])] for x in (at, other)
    )
    torch.testing.assert_close(a.mean, b.mean)
    torch.testing.assert_close(a.stddev, b.stddev)


# Predictions


def fitted_on_ratings(**options: Any) -> bh.Posterior:
    model = tiny_model(bh.presets.lora(rank=8), **options)
    guide = bh.autoguide("laplace", model)
    assert isinstance(guide, LaplaceGuide)
    guide.set_covariance(guide.prior.covariance)
    return bh.Posterior(model, guide, ())


@pytest.mark.parametrize("guide", ["laplace", "normal", "delta"])
def test_inference_mode_changes_nothing(guide: str) -> None:
    """As many write around predictions; the linearised network takes gradients in it."""
    model = tiny_model((bh.peft.LoRA(rank=2, layers=(-1,)),))  # of which lower states are kept
    posterior = bh.fit(model, guide, tiny_examples(), max_steps=2, progress=False)
    outside = posterior.predict(TEXTS, 5)
    with torch.inference_mode():
        inside = posterior.predict(TEXTS, 5)
        copied = posterior.predict(tiny_examples(), 5)
    assert torch.equal(inside.probabilities, outside.probabilities)
    assert torch.equal(copied.probabilities, posterior.predict(tiny_examples(), 5).probabilities)


def test_draws_are_held_once() -> None:
    """Draws, their way from the mean, and both flattened side by side would be three copies."""
    posterior, samples = fitted_on_ratings(), 2000
    copy = samples * 4 * sum(site.numel for site in posterior.model.sites)
    with Memory() as memory:
        posterior.predict(TEXTS, samples, keep_samples=True)
    assert copy < memory.peak < 1.2 * copy


def test_many_draws_are_predicted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal forecasts, whose memory does not grow; noise scales are parted as the weights are."""
    posterior, samples = fitted_on_ratings(outputs=1, likelihood=Normal(3.0, 2.0)), 2000
    whole = posterior.predict(TEXTS, samples, keep_samples=True)
    part = 128 * 4 * sum(site.numel for site in posterior.model.network.sites)
    monkeypatch.setattr(linear, "MAX_BYTES", part)
    with Memory() as memory:
        parted = posterior.predict(TEXTS, samples, keep_samples=True)
    torch.testing.assert_close(parted.means, whole.means, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(parted.sds, whole.sds)
    assert memory.peak < 3 * part < samples / 128 * part
