"""The scale of the PEFT weights' prior, found by empirical Bayes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch.distributions import kl_divergence

from bhpeft_pyro import Model, Posterior, fit, fitting
from bhpeft_pyro.distributions import Covariance, LowRankNormal
from bhpeft_pyro.guides import LowRankGuide
from bhpeft_pyro.inference.elbo import ELBO
from bhpeft_pyro.inference.optimise import optimise
from bhpeft_pyro.inference.scale import PriorScale
from bhpeft_pyro.peft import Kind, LoRA, Prefix
from bhpeft_pyro.priors import FunctionSpaceNormal
from bhpeft_pyro.testing import tiny_batch, tiny_examples, tiny_model


def _guide_with_noise(kinds: Sequence[Kind] | None = None) -> tuple[Model, LowRankGuide]:
    torch.manual_seed(0)
    model = tiny_model(kinds, prior=FunctionSpaceNormal(head=1.0), aligned=True)
    guide = LowRankGuide(model, rank=3)
    with torch.no_grad():
        guide.loc += 0.1 * torch.randn_like(guide.loc)
    return model, guide


@pytest.mark.parametrize("truth", [0.3, 1.0, 2.0])
@pytest.mark.parametrize(("directions", "shared"), [(400, 0.0), (120, 3.0)])
def test_it_is_the_scale_that_weights_were_drawn_with(
    truth: float, directions: int, shared: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen with noise along some directions, under the exact posterior of every scale on the way.

    What is seen depends on the head as well, `shared` times as much as on weights of scale 1: much
    may be put down to either of them, and does not tell of the weights.
    """
    monkeypatch.setattr("bhpeft_pyro.inference.scale._EXPECTED", 0.01)
    model = tiny_model((LoRA(rank=8),), prior=FunctionSpaceNormal(head=1.0), aligned=True)
    guide = LowRankGuide(model, rank=directions)
    scale = PriorScale.of(model, guide)
    assert scale is not None
    added = guide.at(scale.coordinates.added)
    head = guide.at(["head.weight", "head.bias"])
    torch.manual_seed(0)
    axes = torch.zeros(len(added), directions)
    axes[added] = torch.linalg.qr(torch.randn(int(added.sum()), directions))[0]
    slopes = shared * torch.randn(directions, int(head.sum())) / int(head.sum()) ** 0.5
    precision = torch.logspace(-1, 2, directions)
    noise = torch.randn(directions) / precision.sqrt()
    seen = truth * torch.randn(directions) + slopes @ torch.randn(slopes.shape[1]) + noise
    unit = guide.prior.covariance.scale
    for _ in range(60):
        gain = scale.coordinates.gain
        rows = gain * axes.mT
        rows[:, head] = slopes
        rows = precision.sqrt().unsqueeze(-1) * rows  # of unit noise, by weights of unit sd
        told = torch.linalg.solve(torch.eye(directions) + rows @ rows.mT, precision.sqrt() * seen)
        with torch.no_grad():
            guide.loc.copy_(unit * (rows.mT @ told))
        guide.covariance = Covariance.from_precision(unit.pow(-2), rows.mT / unit.unsqueeze(-1))
        scale.step()
    assert scale.coordinates.gain == pytest.approx(gain, rel=1e-3)
    assert gain == pytest.approx(truth, rel=0.25 if shared else 0.15)


@pytest.mark.parametrize("kinds", [(LoRA(rank=2),), (Prefix(length=4, encoder=3),)])
def test_the_search_begins_without_moving_the_weights(kinds: Sequence[Kind]) -> None:
    """Those of an earlier fit, or of an encoder, whose output side does not start at zero."""
    model, guide = _guide_with_noise(kinds)
    batch = tiny_batch()
    means = guide.means()
    before = model.outputs(means, batch)
    scale = PriorScale.of(model, guide)
    assert scale is not None
    after = scale.model.outputs(guide.means(), batch)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    # Another posterior with this network may predict while a fit looks for its scale.
    assert torch.equal(model.outputs(means, batch), before)


def test_a_step_moves_the_prior_and_not_the_weights() -> None:
    model, guide = _guide_with_noise()
    scale = PriorScale.of(model, guide)
    assert scale is not None
    unit, names = guide.prior.covariance.scale, scale.coordinates.added
    with torch.no_grad():  # as far out as before the search began, in its own units
        guide.loc[guide.at(names)] *= scale.coordinates.gain
    root = torch.randn(len(unit), 3) / unit.unsqueeze(-1)
    guide.covariance = Covariance.from_precision(2 * unit.pow(-2), root)

    def state() -> tuple[torch.Tensor, torch.Tensor]:
        """The outputs at the mean; what data have added to the precision, in units of weights."""
        gain, old = scale.coordinates.gain, guide.covariance
        parts = guide.unpack(guide.loc)
        gains = torch.cat(
            [torch.full((p.numel(),), gain if n in names else 1.0) for n, p in parts.items()]
        )
        rows = old.precision_root() / gains.unsqueeze(-1)
        more = (old.scale.pow(-2) - unit.pow(-2)) / gains.square()
        return scale.model.outputs(guide.means(), tiny_batch(4)), rows @ rows.T + more.diag()

    before, gain = state(), scale.coordinates.gain
    scale.step()
    assert scale.coordinates.gain != pytest.approx(gain, rel=0.5)
    after = state()
    torch.testing.assert_close(after[0], before[0], rtol=1e-3, atol=1e-4)
    # Single precision: of entries that cancel, what is left is rounding of the largest.
    atol = 1e-5 * before[1].abs().max().item()
    torch.testing.assert_close(after[1], before[1], rtol=1e-3, atol=atol)


@pytest.mark.parametrize("kinds", [(LoRA(rank=2),), (Prefix(3),), (Prefix(3, encoder=2),)])
def test_settling_changes_neither_predictions_nor_divergence(kinds: Sequence[Kind]) -> None:
    model, guide = _guide_with_noise(kinds)
    scale = PriorScale.of(model, guide)
    assert scale is not None
    scale.coordinates.gain = 0.3
    batch = tiny_batch(4)
    elbo = ELBO(num_particles=2)

    def parts(model: object) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(1)
        elbo(model, guide)(batch.split(2))
        assert elbo.parts is not None
        return elbo.parts.nll, sum(elbo.parts.kl.values())

    before = parts(scale.model)
    settled = scale.settle()
    after = parts(settled)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert settled.prior == FunctionSpaceNormal(change=0.3 * 0.1, head=1.0)
    assert settled.network is model.network


@pytest.mark.parametrize("learnable", [True, False])
def test_scale_goes_where_the_bound_is(learnable: bool) -> None:
    """Wider than expected where much is learnt; down from the start where labels say nothing."""
    other = 0.1 if learnable else 0.3
    examples = tiny_examples(100)
    if not learnable:
        labels = torch.randint(2, (100,), generator=torch.Generator().manual_seed(0))
        examples = replace(examples, labels=labels)

    def fitted(change: float | None) -> Posterior:
        model = tiny_model(prior=FunctionSpaceNormal(change=change, head=2.0), aligned=True)
        return fit(model, "linear", examples, max_steps=200, progress=False)

    given, found = fitted(other), fitted(None)
    assert given.model.prior == FunctionSpaceNormal(change=other, head=2.0)
    prior = found.model.prior
    assert isinstance(prior, FunctionSpaceNormal) and prior.change is not None
    assert prior.change > 0.15 if learnable else prior.change < 0.11
    assert found.first_prior is prior
    assert found.report.found == {"change": prior.change}
    assert f"found from the data: change {prior.change:.3g}" in str(found.report)
    assert not given.report.found
    margin = 0.02 if learnable else 0.01
    assert found.report.last("loss", 20) < given.report.last("loss", 20) - margin


@pytest.mark.parametrize("gated", [False, True])
def test_the_kl_that_is_reported_is_to_the_prior_that_is_kept(gated: bool) -> None:
    """Of gates too, which are no output side: the scale that is found is not theirs."""
    model = tiny_model((LoRA(rank=2, gated=gated),), aligned=True)
    posterior = fit(model, "linear", tiny_examples(64), max_steps=60, progress=False)
    guide = posterior.guide
    assert isinstance(guide, LowRankGuide)
    now = kl_divergence(LowRankNormal(guide.loc.detach(), guide.covariance), guide.prior)
    assert posterior.report.kl["weights"] == pytest.approx(now.item(), rel=1e-3)
    assert posterior.report.found["change"] != pytest.approx(0.1, rel=0.01)


def test_restarts_begin_with_the_prior_that_the_first_one_has_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A covariance that is still that of the prior before would cost many nats."""
    begun = []

    def spied(model: Model, guide: LowRankGuide, *rest: object) -> None:
        begun.append((guide.covariance.scale, guide.prior.covariance.scale))
        optimise(model, guide, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(fitting, "optimise", spied)
    model = tiny_model(aligned=True)
    fit(model, "linear", tiny_examples(64), restarts=2, max_steps=30, progress=False)
    (_, before), (own, prior) = begun
    assert torch.equal(own, prior) and not torch.equal(before, prior)
