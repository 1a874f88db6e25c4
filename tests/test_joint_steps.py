"""How the mean of a joint guide is moved, against Adam in other coordinates and closed forms."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pyro.distributions import Bernoulli, Categorical, Normal, TorchDistribution
from torch import Tensor, nn

import bhpeft_pyro as bh
from bhpeft_pyro.distributions import Covariance, LowRankNormal
from bhpeft_pyro.guides import LowRankGuide
from bhpeft_pyro.guides.optimizers import WhitenedAdam, optimizers
from bhpeft_pyro.inference.curvature import every
from bhpeft_pyro.inference.elbo import ELBO
from bhpeft_pyro.testing import tiny_batch, tiny_model


def narrow(size: int, rank: int = 3) -> Covariance:
    """One that is far from diagonal."""
    torch.manual_seed(0)
    return Covariance.from_precision(1 + 9 * torch.rand(size), 10 * torch.randn(size, rank))


def test_pull_is_the_adjoint_of_root() -> None:
    covariance = narrow(20)
    noise, slope = torch.randn(2, 20)
    expected = covariance.root(noise) @ slope
    torch.testing.assert_close(noise @ covariance.pull(slope), expected)


def test_steps_are_adam_s_in_the_coordinates_that_are_given() -> None:
    guide = LowRankGuide(tiny_model(()))
    size = len(guide.loc)
    prior = LowRankNormal(torch.randn(size), narrow(size))
    guide.prior = prior
    with torch.no_grad():
        guide.loc.copy_(prior.loc)
    goal = prior.loc + torch.randn(size)
    white = torch.zeros(size, requires_grad=True)
    theirs = torch.optim.Adam([white], lr=0.1)
    ours = WhitenedAdam(guide.loc, prior.loc, prior.covariance, lr=0.1)
    for _ in range(20):
        for optimiser, place in (
            (theirs, prior.loc + prior.covariance.root(white)),
            (ours, guide.loc),
        ):
            optimiser.zero_grad()
            (place - goal).pow(4).sum().backward()
            optimiser.step()
    expected = prior.loc + prior.covariance.root(white.detach())
    torch.testing.assert_close(guide.loc.detach(), expected, atol=1e-4, rtol=1e-4)
    assert (expected - prior.loc).abs().max() > 0.1


def test_steps_go_on_from_where_the_mean_is() -> None:
    """As in a fit that starts at a fitted head, away from the prior's mean."""
    start, center = torch.randn(2, 20)
    loc = nn.Parameter(start.clone())
    steps = WhitenedAdam(loc, center, narrow(20), lr=1e-9)
    loc.square().sum().backward()
    steps.step()
    torch.testing.assert_close(loc.detach(), start, atol=1e-4, rtol=1e-4)
    assert (start - center).abs().max() > 0.1


@pytest.mark.parametrize("guide", ["lowrank", "laplace", "delta"])
def test_a_joint_mean_has_steps_in_sds_of_its_prior_and_a_point_in_weights(guide: str) -> None:
    """But for a point's noise scale, whose steps are ten times as large: it has far to go."""
    model = tiny_model((), outputs=1, prior=Normal(0.3, 0.5), likelihood=bh.likelihoods.Normal())
    made = bh.autoguide(guide, model, components=1)
    before = made.means()
    options = bh.FitOptions(joint_lr=0.02, lr=0.003)
    steppers = optimizers(made, options, examples=10)
    sum(parameter.sum() for parameter in made.parameters()).backward()  # type: ignore[union-attr]
    for stepper in steppers:
        stepper.step()
    size = 0.02 * 0.5 if guide == "lowrank" else 0.003
    assert "noise.log_scale" in before
    for name, value in made.means().items():  # Adam's first step is its step size
        ten = 10 if guide != "lowrank" and name == "noise.log_scale" else 1
        expected = torch.full_like(value, ten * size)
        torch.testing.assert_close(before[name] - value, expected, rtol=1e-3, atol=0.0)


def test_the_loss_of_a_joint_guide_has_the_kl_of_the_whole_normal() -> None:
    """In closed form: of a prior's covariance that it is the distance of the means."""
    model, batch = tiny_model(()), replace(tiny_batch(8), size=8)
    guide = LowRankGuide(model)
    with torch.no_grad():
        guide.loc.add_(torch.randn(len(guide.loc), generator=torch.Generator().manual_seed(1)))
    kl = 0.5 * guide.prior.covariance.unroot(guide.loc - guide.prior.loc).square().sum().item()
    elbo = ELBO(num_particles=2)
    loss = elbo(model, guide)(batch.split(2)).item()
    assert elbo.parts is not None
    assert elbo.parts.kl == {"weights": pytest.approx(kl, rel=1e-4)}
    assert loss == pytest.approx(elbo.parts.nll.item() + kl, rel=1e-4)


def moments(distribution: TorchDistribution, *parameters: Tensor) -> Tensor:
    """E[score score'], from the outcomes."""
    total = torch.zeros(len(parameters), len(parameters))
    for weighted in every(distribution):
        scores = torch.autograd.grad(
            weighted.sum(), parameters, retain_graph=True, materialize_grads=True
        )
        score = torch.stack(scores)
        total += torch.outer(score, score)
    return total


def test_every_outcome_gives_the_fisher_information() -> None:
    mean, log_sd = torch.tensor(1.5, requires_grad=True), torch.tensor(0.7, requires_grad=True)
    found = moments(Normal(mean, log_sd.exp()), mean, log_sd)
    torch.testing.assert_close(found, torch.diag(torch.stack([(-2 * log_sd).exp(), 2 + 0 * mean])))
    logit = torch.tensor(0.4, requires_grad=True)
    p = logit.sigmoid()
    torch.testing.assert_close(moments(Bernoulli(logits=logit), logit), (p * (1 - p)).reshape(1, 1))
    logits = [torch.tensor(value, requires_grad=True) for value in (0.3, -1.0, 2.0, 0.5)]
    for exist in (4, 3):  # the last choice may not be there
        there = torch.stack([*logits[:exist], *[torch.tensor(-torch.inf)] * (4 - exist)])
        p = there.softmax(0)[:exist].detach()
        assert len(every(Categorical(logits=there))) == 3
        torch.testing.assert_close(
            moments(Categorical(logits=there), *logits[:exist]), p.diag() - torch.outer(p, p)
        )
