"""Distillation: the divergence by brute force, what is trained, and which epoch is kept."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import pytest
import torch
from students import fitted, unlabelled
from torch import Tensor
from torch.distributions import kl_divergence

import bhpeft_pyro as bh
from bhpeft_pyro.errors import FitError
from bhpeft_pyro.posterior.distill import Distilled, distil, divergence, targets_of


def test_the_divergence_of_classes_and_choices() -> None:
    logits, wanted = torch.randn(5, 4), torch.randn(5, 4)
    exist = torch.arange(4) < torch.tensor([4, 2, 3, 2, 4]).unsqueeze(1)
    for there in (torch.ones(5, 4, dtype=torch.bool), exist):
        masked = logits.masked_fill(~there, -torch.inf)
        targets = wanted.masked_fill(~there, -torch.inf).softmax(1)
        found = divergence(dist.Categorical(logits=masked), targets)
        ratio = targets.log() - masked.log_softmax(1)
        expected = (targets * ratio).where(there, 0.0).sum(1)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    # A batch of questions with two choices, whose targets are as wide as those of all.
    narrow = divergence(dist.Categorical(logits=logits[[1, 3], :2]), targets[[1, 3]])
    torch.testing.assert_close(narrow, found[[1, 3]])
    assert divergence(dist.Categorical(probs=targets), targets).abs().max() < 1e-6


def test_a_sure_target_has_finite_gradients() -> None:
    logits = torch.tensor([[3.0, -2.0, -torch.inf]]).requires_grad_()
    divergence(dist.Categorical(logits=logits), torch.tensor([[1.0, 0.0, 0.0]])).sum().backward()
    assert logits.grad is not None and logits.grad[:, :2].isfinite().all()
    several = torch.tensor([[30.0, -30.0]]).requires_grad_()
    predicted = dist.Bernoulli(logits=several).to_event(1)
    divergence(predicted, torch.tensor([[0.0, 1.0]])).sum().backward()
    assert several.grad is not None and (several.grad.abs() > 0.9).all()


def test_the_divergence_of_labels_and_ratings() -> None:
    logits, targets = torch.randn(5, 3), torch.rand(5, 3)
    pairs = kl_divergence(torch.distributions.Bernoulli(targets), dist.Bernoulli(logits=logits))
    found = divergence(dist.Bernoulli(logits=logits).to_event(1), targets)
    torch.testing.assert_close(found, pairs.sum(1), atol=1e-5, rtol=1e-4)
    mean, variance, means = torch.randn(5), torch.rand(5) + 0.1, torch.randn(5)
    same = [torch.distributions.Normal(at, variance.sqrt()) for at in (means, mean)]
    found = divergence(dist.Normal(mean, 7.0), torch.stack([means, variance], 1))
    torch.testing.assert_close(found, kl_divergence(*same))


def distilled(kind: str, **changes: Any) -> tuple[dict[str, Tensor], Distilled]:
    """Where one component begins, and what it becomes as it learns from both."""
    posterior = fitted(kind)
    examples = posterior.encode(unlabelled(kind, 80), labelled=False)
    parts = [examples.subset(range(60)), examples.subset(range(60, 80))]
    wanted = [(part, targets_of(posterior.predict(part), examples.kind)) for part in parts]
    options: dict[str, Any] = {"epochs": 2, "batch_size": 16, "lr": 1e-2, "seed": 0, **changes}
    start = posterior.weights(0)
    return start, distil(posterior.model, start, wanted[0], wanted[1], **options)


@pytest.mark.parametrize("kind", ["class", "labels", "noisy rating"])
def test_all_weights_of_the_network_learn_and_the_likelihood_s_stay(kind: str) -> None:
    start, made = distilled(kind)
    likelihood = fitted(kind).model.likelihood
    own = {site.name for site in likelihood.sites}
    if kind in ("stars", "noisy rating"):
        assert own  # otherwise this tests nothing
    assert made.weights.keys() == start.keys()
    for name, value in made.weights.items():
        assert torch.equal(value, start[name]) == (name in own), name
        assert not value.requires_grad
    assert made.best_epoch > 0
    assert made.divergences[made.best_epoch] == min(made.divergences) < made.divergences[0]
    assert len(made.divergences) == 3


def test_what_only_gets_worse_is_the_start() -> None:
    start, made = distilled("class", lr=30.0)
    assert made.best_epoch == 0 and min(made.divergences[1:]) > made.divergences[0]
    assert all(torch.equal(value, start[name]) for name, value in made.weights.items())


def test_numbers_that_are_not_finite_end_it() -> None:
    with pytest.raises(FitError, match=r"distill: .* not finite any more; expected a smaller lr"):
        distilled("class", lr=1e30)


def test_a_seed_repeats_it_and_the_global_random_state_stays() -> None:
    torch.manual_seed(8)
    before = torch.get_rng_state()
    _, first = distilled("choice")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(9)
    _, again = distilled("choice")
    _, other = distilled("choice", seed=1)
    assert first.divergences == again.divergences != other.divergences


def test_targets() -> None:
    means, sds = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.5], [0.5]])
    ratings = bh.forecast.RatingForecast.from_draws(means, sds)
    torch.testing.assert_close(targets_of(ratings, "rating"), torch.tensor([[2.0, 1.25]]))
