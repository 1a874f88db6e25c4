"""The choice of width, noise and output scale, against brute force over held-out rows."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch
from laplace_fits import exactly
from torch import Tensor

import bhpeft_pyro as bh
from bhpeft_pyro.guides.laplace import choice_of_tau, held_out_densities
from bhpeft_pyro.guides.laplace.choice_of_tau import Candidates
from bhpeft_pyro.model.likelihoods import HeteroscedasticNormal, Likelihood, Normal
from bhpeft_pyro.model.linearized import LinearOutputs, normal_points
from bhpeft_pyro.testing import tiny_examples, tiny_model


def outputs_of(values: Tensor) -> LinearOutputs:
    return LinearOutputs(tiny_model((), 3), values, (3,), None)


@pytest.mark.parametrize("noise", [0.2, 1.0])
@pytest.mark.parametrize("likelihood", [Normal(3.0, 2.0), HeteroscedasticNormal(3.0, 2.0)])
def test_a_ratings_noise_is_the_best_for_held_out_rows(
    likelihood: Likelihood, noise: float
) -> None:
    """The closed form against a search over factors of the noise, tau by tau."""
    torch.manual_seed(1)
    count = likelihood.outputs or 0
    model = tiny_model((), count, likelihood=likelihood)
    taus = torch.logspace(-2, 2, 5, dtype=torch.float64)
    log_scale = torch.tensor(0.3).log()
    mean = torch.cat([torch.randn(30, count), log_scale.expand(30, 1)], 1)
    outputs = LinearOutputs(model, mean, (count,), None)
    labels = 3.0 + 2.0 * mean[:, 0] + noise * torch.randn(30)
    found = [[torch.diag_embed(torch.rand(30, 1).double() / tau)] for tau in taus]
    choice = held_out_densities.with_normal_noise(
        taus, found, [(outputs, labels)], free=True
    ).best()
    trained = outputs.labels(mean).stddev.double().expand(30)
    errors = (labels - 3.0 - 2.0 * mean[:, 0]).double()
    nlls = {}
    for tau, each in zip(taus.tolist(), found, strict=True):
        for factor in torch.logspace(-1.5, 1.5, 2000, dtype=torch.float64).tolist():
            variance = factor**2 * (trained.square() + 4.0 * each[0][:, 0, 0])
            nll = 0.5 * (errors.square() / variance + (2 * math.pi * variance).log()).mean()
            nlls[tau, factor] = nll.item()
    tau, factor = min(nlls, key=nlls.__getitem__)
    assert choice.noise == pytest.approx(factor, rel=5e-3)
    assert choice.tau * choice.noise**2 == pytest.approx(tau)
    assert choice.nll == pytest.approx(nlls[tau, factor], abs=1e-4)


def test_a_width_never_costs_more_than_a_thousandth_or_three() -> None:
    """Where the point is right and sure of all, any width does harm."""
    model = tiny_model((), prior=bh.priors.FunctionSpaceNormal(head=30.0))
    examples, held_out = tiny_examples(48), tiny_examples(40, seed=3)
    posterior = exactly(
        model, examples, max_steps=150, lr=0.5, temperature=0.0, tau=None, validation=held_out
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
        assert one.best().tau == choice_of_tau.best_together([one])[0][0].tau == best


def test_the_widths_of_components_are_the_best_for_their_mixture() -> None:
    """Two components that lie apart say as much as the labels vary by that alone: each by itself
    wants to be wide, both together need not be."""
    generator = torch.Generator().manual_seed(0)
    labels = 1.2 * torch.randn(400, generator=generator, dtype=torch.float64)
    taus = choice_of_tau.TAUS
    sds = (0.1 + 1 / taus.sqrt()).unsqueeze(-1)

    def component(mean: float) -> Candidates:
        normal = torch.distributions.Normal(torch.tensor(mean, dtype=torch.float64), sds)
        density = normal.log_prob(labels)[:, None]
        return Candidates(taus, torch.ones(len(taus)), torch.ones(1), density, density[-1, 0])

    every = [component(-1.0), component(1.0)]
    alone = [each.best().tau for each in every]
    choices, point_nll, nll = choice_of_tau.best_together(every)
    densities = torch.cat([each.log_densities for each in every], 1)
    together = [*(math.log(2) - densities.logsumexp(1)).mean(1)]
    good = torch.stack(together) <= 1.001 * min(together)  # the nearest that is nearly the best
    brute = taus[int(good.nonzero()[0])].item()
    assert alone[0] == alone[1] < brute
    assert [choice.tau for choice in choices] == pytest.approx([brute, brute])
    assert nll <= 1.001 * min(together).item() and nll < point_nll


def test_the_output_scale_is_the_best_for_held_out_rows() -> None:
    """Outputs that should be three times as large, against a loop; and few rows hardly say so."""
    torch.manual_seed(0)
    values = torch.randn(400, 3)
    labels = dist.Categorical(logits=3 * values).sample()
    sd, taus = torch.eye(3).expand(400, 3, 3) * 0.1, torch.tensor([0.1, 1.0, 10.0]).double()
    held = [(outputs_of(values[:150]), labels[:150]), (outputs_of(values[150:]), labels[150:])]
    spreads = [[sd[:150] / tau, sd[150:] / tau] for tau in taus]
    found = held_out_densities.of_draws(taus, spreads, held, scaled=True)
    scales = held_out_densities.OUTPUT_SCALES
    noise = normal_points(choice_of_tau.DRAWS, 3, seed=0)
    for tau, scale in ((0, 3), (1, 14), (2, 9)):
        drawn = outputs_of(scales[scale] * values).draws(scales[scale] ** 2 * sd / taus[tau], noise)
        chosen = drawn.softmax(-1).gather(-1, labels.expand(len(drawn), -1).unsqueeze(-1))
        expected = chosen.squeeze(-1).mean(0).log().double()
        torch.testing.assert_close(found.log_densities[tau, scale], expected, rtol=1e-3, atol=1e-3)
    of_point = dist.Categorical(logits=values).log_prob(labels).double()
    torch.testing.assert_close(found.point, of_point, rtol=1e-4, atol=1e-4)

    choice, plain = (
        found.best(),
        held_out_densities.of_draws(taus, spreads, held, scaled=False).best(),
    )
    assert choice.tau == plain.tau and plain.output_scale == 1.0  # the width is chosen without
    nlls = scales.log() ** 2 / 200 - found.log_densities[taus.tolist().index(choice.tau)].mean(-1)
    assert choice.output_scale == pytest.approx(scales[nlls.argmin()].item())
    assert choice.output_scale == pytest.approx(3.0, rel=0.3)
    assert choice.nll is not None and plain.nll is not None and choice.nll < plain.nll - 0.1
    assert choice.point_nll == plain.point_nll

    sure = [(outputs_of(values[:2]), values[:2].argmax(1))]  # both right: the larger the better
    few = held_out_densities.of_draws(taus, [[sd[:2] / tau] for tau in taus], sure, scaled=True)
    assert few.best().output_scale < 1.6


def test_the_output_scales_of_components_are_the_best_for_their_mixture() -> None:
    """The mean of predictions that err apart is less certain than it should be."""
    torch.manual_seed(0)
    truth = 2 * torch.randn(1000, 3)
    labels = dist.Categorical(logits=truth).sample()
    taus, scales = torch.ones(1).double(), held_out_densities.OUTPUT_SCALES

    def component(factor: float) -> Candidates:
        values = factor * (truth + 1.5 * torch.randn(1000, 3))
        held = [(outputs_of(values), labels)]
        return held_out_densities.of_draws(taus, [[torch.zeros(1000, 3, 3)]], held, scaled=True)

    every = [component(factor) for factor in (0.5, 1.0, 1.0, 2.0)]
    alone = [scales.tolist().index(each.best().output_scale) for each in every]
    assert alone[0] > alone[1] > alone[3]
    together = []
    for shift in range(-4, 5):
        at = [each.log_densities[0, i + shift] for i, each in zip(alone, every, strict=True)]
        nll = (math.log(4) - torch.stack(at).logsumexp(0)).mean()
        costs = [scales[i + shift].log() ** 2 / 500 for i in alone]
        together.append((nll + sum(costs) / 4).item())
    best = together.index(min(together)) - 4
    choices, point_nll, nll = choice_of_tau.best_together(every)
    assert best > 0
    for index, choice in zip(alone, choices, strict=True):
        assert choice.output_scale == pytest.approx(scales[index + best].item())
    assert nll == pytest.approx(min(together), abs=1e-3)
    points = torch.stack([each.point for each in every]).logsumexp(0)
    assert nll < point_nll == pytest.approx((math.log(4) - points).mean().item())
