"""Normal guides and points, and their optimisers on losses whose gradients are known."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scaled_priors import with_extras
from torch import Tensor, nn

import bhpeft_pyro as bh
from bhpeft_pyro.guides import MeanFieldGuide
from bhpeft_pyro.guides.mean_field import NaturalGradient, ScaledAdam
from bhpeft_pyro.testing import tiny_batch, tiny_examples, tiny_model

# N(target, 1 / precision) per coordinate, over seven orders of magnitude
TARGET = torch.tensor([-3.0, 0.0, 0.5, 0.6])
PRECISION = torch.tensor([1e-2, 1.0, 1e2, 1e4])


def test_ours_start_at_the_sites_own_start_and_the_priors_sd() -> None:
    model = tiny_model(prior={"lora.*": dist.Normal(0.0, 0.3), "*": dist.StudentT(3.0, 0.0, 0.5)})
    guide = MeanFieldGuide(model)
    means = {name: mean[None] for name, mean in guide.means().items()}
    for name, weights in model.network.coordinates(means).items():
        assert bool(weights.any()) == name.endswith(".A")
    scales = guide.scales()
    torch.testing.assert_close(scales["lora.query.A"], torch.full((2, 2, 16), 0.3))
    sd = 0.5 * 3**0.5  # of a Student t with 3 degrees of freedom
    torch.testing.assert_close(scales["head.bias"], torch.full((2,), sd))
    narrow = MeanFieldGuide(model, ("normal", {"init_scale": 0.01})).scales()
    assert all(torch.allclose(scale, torch.tensor(0.01)) for scale in narrow.values())


@pytest.mark.parametrize("name", ["normal", "delta", "AutoNormal"])
def test_constrained_latents_stay_in_their_support(name: str) -> None:
    model = tiny_model((), prior=with_extras)
    with pyro.get_param_store().scope():
        guide: Any = bh.autoguide(name, model)
        guide(tiny_batch())
        with torch.no_grad():
            for parameter in guide.parameters():
                parameter.add_(2 * torch.randn_like(parameter))
        with poutine.trace() as tracer, pyro.plate("draws", 50, dim=-2):
            guide(tiny_batch())
    values = {name: node["value"] for name, node in tracer.trace.nodes.items()}
    assert values["tau"].shape == (50, 1, 3)
    assert (values["tau"] > 0).all()
    assert ((values["share"] > 0) & (values["share"] < 1)).all()
    torch.testing.assert_close(values["mix"].sum(-1), torch.ones(50, 1))


def test_distributions_and_means_are_detached_copies_of_the_same_density() -> None:
    model = tiny_model((), prior=with_extras)
    guide = MeanFieldGuide(model, ("normal", {"init_scale": 0.2}))
    kept = guide.distributions()
    trace = poutine.trace(guide).get_trace()
    replayed = poutine.replay(bh.priors.PosteriorPrior(kept), trace)
    as_prior = poutine.trace(replayed).get_trace(model.sites)
    torch.testing.assert_close(as_prior.log_prob_sum(), trace.log_prob_sum())
    values = {name: guide.means()[name] for name in kept}
    before = {name: q.log_prob(values[name]) for name, q in kept.items()}
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(1.0)
    for name, q in kept.items():
        assert not q.log_prob(values[name]).requires_grad
        assert not q.sample().requires_grad
        torch.testing.assert_close(q.log_prob(values[name]), before[name])
        assert (guide.distributions()[name].log_prob(values[name]) != before[name]).all()


def parameters(sd: float, size: int = 4) -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(torch.zeros(size)), nn.Parameter(torch.full((size,), math.log(sd)))


def kl_to_target(loc: Tensor, log_scale: Tensor) -> Tensor:
    """KL(N(loc, scale^2) || N(TARGET, 1 / PRECISION)) up to a constant."""
    quadratic = (loc - TARGET).square() + (2 * log_scale).exp()
    return (0.5 * PRECISION * quadratic - log_scale).sum()


def run(loc: nn.Parameter, log_scale: nn.Parameter, steps: int, **options: float) -> None:
    optimiser = NaturalGradient([(loc, log_scale)], **options)
    for _ in range(steps):
        optimiser.zero_grad()
        kl_to_target(loc, log_scale).backward()
        optimiser.step()


def test_a_step_is_that_of_the_written_out_equations() -> None:
    loc = nn.Parameter(torch.tensor([1.0, -2.0]))
    log_scale = nn.Parameter(torch.tensor([0.5, 0.1]).log())
    optimiser = NaturalGradient([(loc, log_scale)], lr=0.1, momentum=0.0, averaging=0.0)
    loc.grad = torch.tensor([0.6, -0.3])
    log_scale.grad = torch.tensor([0.8, -1.5])
    precision = torch.tensor([4.0, 100.0])
    # dL/dP = (dL/du) (du/dP) with u = -log(P) / 2, and the step in log P is -lr (-2 P dL/dP) ...
    new_precision = precision * torch.tensor([0.1 * 0.8, 0.1 * -1.5]).exp()
    new_loc = torch.tensor([1.0, -2.0]) - 0.1 * torch.tensor([0.6, -0.3]) / new_precision
    optimiser.step()
    torch.testing.assert_close((-2 * log_scale).exp().detach(), new_precision)
    torch.testing.assert_close(loc.detach(), new_loc)


def test_averages_are_exponential_and_corrected_for_their_start() -> None:
    loc, log_scale = parameters(1.0, 1)
    optimiser = NaturalGradient([(loc, log_scale)], lr=0.1, momentum=0.9, averaging=0.5)
    slopes, bends = [0.3, -0.2, 0.4], [0.2, 0.1, -0.3]
    x, u = 0.0, 0.0
    for step in range(3):
        loc.grad, log_scale.grad = torch.tensor([slopes[step]]), torch.tensor([bends[step]])
        optimiser.step()
        ages = range(step, -1, -1)
        slope = sum(0.9**age * slopes[step - age] for age in ages) / sum(0.9**a for a in ages)
        bend = sum(0.5**age * bends[step - age] for age in ages) / sum(0.5**a for a in ages)
        u -= 0.1 * bend / 2
        x -= 0.1 * slope * math.exp(2 * u)
    assert loc.item() == pytest.approx(x, rel=1e-5)
    assert log_scale.item() == pytest.approx(u, rel=1e-5)


@pytest.mark.parametrize("sd", [1e-3, 10.0])
def test_it_reaches_the_exact_posterior_from_any_start(sd: float) -> None:
    loc, log_scale = parameters(sd)
    run(loc, log_scale, 400, lr=0.1)
    scale = PRECISION.rsqrt()
    assert ((loc.detach() - TARGET) / scale).abs().max() < 0.01
    assert (log_scale.detach() - scale.log()).abs().max() < 0.01


@pytest.mark.parametrize("lr", [0.1, 100.0])
@pytest.mark.parametrize("gradient", [-1e30, -1.0, 0.0, 1.0, 1e30])
def test_precision_stays_positive_and_finite_for_any_gradient(gradient: float, lr: float) -> None:
    loc, log_scale = parameters(0.1)
    optimiser = NaturalGradient([(loc, log_scale)], lr=lr)
    for _ in range(20):
        loc.grad, log_scale.grad = (torch.full((4,), gradient) for _ in range(2))
        optimiser.step()
    precision = (-2 * log_scale).exp()
    assert (precision > 0).all()
    assert precision.isfinite().all()
    assert loc.isfinite().all()


def test_far_from_the_optimum_noise_does_not_freeze_the_weights() -> None:
    # Starting 100 times too wide, with one draw a step: the gradient of log scale is
    # 10^4 times as large as near the optimum, and as noisy. Unbounded steps make
    # some sds collapse on the way.
    torch.manual_seed(0)
    loc, log_scale = parameters(1.0, 200)
    optimiser = NaturalGradient([(loc, log_scale)], lr=0.1)
    for step in range(500):
        optimiser.param_groups[0]["lr"] = 0.1 * (1 - step / 500)
        optimiser.zero_grad()
        draw = loc + log_scale.exp() * torch.randn(200)
        (0.5 * 1e4 * (draw - 0.5).square() - log_scale).sum().backward()
        optimiser.step()
    assert ((loc.detach() - 0.5) / 0.01).abs().max() < 5.0
    assert (log_scale.detach() - math.log(0.01)).abs().max() < 0.7


def test_a_pair_without_gradient_is_left_alone() -> None:
    pairs = [parameters(0.1), parameters(0.1)]
    optimiser = NaturalGradient(pairs)
    kl_to_target(*pairs[0]).backward()
    optimiser.step()
    assert (pairs[0][0] != 0).any()
    assert (pairs[1][0] == 0).all()
    assert (pairs[1][1] == math.log(0.1)).all()


def test_step_sizes_of_adam_differ_from_weight_to_weight() -> None:
    """They are those of Adam on weights in units of the sizes."""
    sizes, target = torch.tensor([1.0, 10.0, 0.5]), torch.tensor([1.0, 20.0, -3.0])
    weights, scaled = nn.Parameter(torch.ones(3)), nn.Parameter(1 / sizes)
    ours, theirs = ScaledAdam(weights, sizes, lr=0.1), torch.optim.Adam([scaled], lr=0.1)
    for _ in range(20):
        for optimiser, value in ((ours, weights), (theirs, sizes * scaled)):
            optimiser.zero_grad()
            (value - target).square().sum().backward()
            optimiser.step()
    torch.testing.assert_close(weights.detach(), (sizes * scaled).detach())


@pytest.mark.parametrize("temperature", [0.1, 0.01])
def test_the_default_step_is_a_cold_posteriors(temperature: float) -> None:
    """With the step of temperature 1 the means hardly move: its time constant is 1 / (lr T)."""
    data = tiny_examples(64)
    options: dict[str, Any] = {"temperature": temperature, "epochs": 15, "progress": False}
    cold = bh.fit(tiny_model(()), "normal", data, **options)
    warm = bh.fit(tiny_model(()), "normal", data, lr=0.1, **options)
    assert cold.report.last("nll") < 0.75 * warm.report.last("nll")
