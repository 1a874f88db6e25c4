"""The noise scale of ratings in later rounds, from errors before and after a round."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bhpeft_pyro as bh
from bhpeft_pyro.data import Examples, encode
from bhpeft_pyro.guides.laplace.curvature import jacobians
from bhpeft_pyro.testing import tiny_model, tiny_tokenizer


def ratings(count: int, seed: int, sd: float) -> Examples:
    """Texts whose ratings are as noisy as this sd."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(5, 45, (count, 3), generator=generator).tolist()
    labels = [0.05 * row[0] + sd * torch.randn((), generator=generator).item() for row in words]
    rows = {"text": [" ".join(f"w{word}" for word in row) for row in words], "label": labels}
    return encode(rows, tiny_tokenizer(), kind="rating")


def variance(posterior: bh.Posterior, examples: Examples) -> float:
    """The mean squared error of the mean ratings."""
    forecast: Any = posterior.predict(examples, samples=0)
    return float((forecast.mean - forecast.observed()).square().mean())


def noise(posterior: bh.Posterior) -> float:
    """The variance of the noise."""
    scale = posterior.guide.means()["noise.log_scale"].exp()
    return float((scale * posterior.model.likelihood.unit).square())


def noise_share(posterior: bh.Posterior, examples: Examples) -> float:
    """Of the variance of ratings, that of their noise."""
    forecast: Any = posterior.predict(examples, method="exact")
    return noise(posterior) / (noise(posterior) + float(forecast.within.mean()))


@pytest.mark.parametrize(
    ("kinds", "held_out", "keep"),
    [((), False, 0.5), ((), True, 1.0), (bh.presets.lora(rank=2), False, 1.0)],
)
def test_the_noise_of_rounds_is_pooled_by_their_rows(
    kinds: Any, held_out: bool, keep: float
) -> None:
    model = tiny_model(kinds, 1, likelihood=bh.likelihoods.Normal(1.0, 2.0))
    how: dict[str, Any] = {"components": 1, "progress": False, "seed": 1}
    first = bh.fit(model, "laplace", ratings(60, 0, 0.3), **how)
    new, others = ratings(30, 1, 2.0), ratings(30, 2, 2.0)
    second = first.update(new, validation=others if held_out else None, keep=keep, progress=False)
    if held_out:  # as in a first fit
        forecast: Any = second.predict(others, method="exact")
        shares = noise(second) / (noise(second) + forecast.within)
        expected = ((forecast.mean - forecast.observed()).square() * shares).mean().item()
    else:
        here = (variance(first, new) * variance(second, new)) ** 0.5 * noise_share(second, new)
        rows, before = len(new), keep * first.report.examples
        expected = (rows * here + before * noise(first)) / (rows + before)
    assert noise(second) == pytest.approx(expected, rel=0.01)
    assert noise(second) > 2 * noise(first)  # the new ratings are noisier


def test_rows_that_an_earlier_round_forgot_do_not_count() -> None:
    model = tiny_model((), 1, likelihood=bh.likelihoods.Normal(1.0, 2.0))
    first = bh.fit(model, "laplace", ratings(60, 0, 0.3), components=1, progress=False)
    assert first.report.examples == 48
    second = first.update(ratings(40, 1, 0.5), keep=0.5)
    new = ratings(30, 2, 2.0)
    third = second.update(new, keep=1.0)
    here = (variance(second, new) * variance(third, new)) ** 0.5 * noise_share(third, new)
    before = 40 + 0.5 * 48
    expected = (len(new) * here + before * noise(second)) / (len(new) + before)
    assert noise(third) == pytest.approx(expected, rel=0.01)


@pytest.mark.filterwarnings("ignore:data. a rating of .* is beyond")
def test_the_ends_of_a_scale_do_not_change_what_is_learnt() -> None:
    data = ratings(60, 0, 0.5)
    assert data.labels is not None
    free, ended = (
        bh.fit(
            tiny_model((), 1, likelihood=bh.likelihoods.Normal(1.0, 2.0, **ends)),
            "laplace",
            data,
            components=1,
            progress=False,
        )
        for ends in ({}, {"low": 0.8, "high": 1.2})
    )
    assert noise(free) == noise(ended)


def test_a_report_has_the_nll_of_held_out_rows_under_its_noise() -> None:
    model = tiny_model((), 1, likelihood=bh.likelihoods.Normal(1.0, 2.0))
    how: dict[str, Any] = {"components": 2, "progress": False}
    first = bh.fit(model, "laplace", ratings(60, 0, 0.3), **how)
    others = ratings(40, 2, 2.0)
    second = first.update(ratings(30, 1, 2.0), validation=others)
    exact: Any = second.predict(others, method="exact")
    assert second.report.component_nll == pytest.approx(exact.nlls().mean().item(), rel=1e-2)


@pytest.mark.parametrize(("rank", "held_out"), [(2, False), (18, True)])
def test_the_information_of_all_rounds_is_that_under_the_last_noise(
    rank: int, held_out: bool
) -> None:
    """The precision of a linear regression, in closed form; its diagonal is exact at any rank."""
    likelihood = bh.likelihoods.Normal(1.0, 2.0)
    model = tiny_model((), 1, likelihood=likelihood)
    all_directions = bh.autoguide("laplace", model, rank=rank)
    first = bh.fit(model, all_directions, ratings(60, 0, 0.3), progress=False)
    data, _ = first.report.parted(ratings(60, 0, 0.3))
    new, others = ratings(30, 1, 2.0), ratings(30, 2, 2.0)
    second = first.update(new, validation=others if held_out else None)
    assert noise(second) > 1.5 * noise(first)
    guide: Any = second.guide
    rows = [row[:, 0] for part in (data, new) for *_, row in jacobians(model, guide.means(), part)]
    inputs = torch.cat(rows).double()
    first_precision = second.report.tau * guide.first_scale.double().pow(-2)
    scale = noise(second) / likelihood.unit**2
    precision = inputs.mT @ inputs / scale + first_precision.diag()
    of_new = inputs[len(data) :].mT @ inputs[len(data) :] / scale
    target: Any = guide.target(second.model, 0.0, True)[0].prior
    weights = ~guide.at({likelihood.noise_site})
    eye = torch.eye(len(weights))[None]
    for covariance, exact in (
        (guide.covariance, precision),
        (target.normal.covariance, precision - of_new),  # what is sampled in its place
    ):
        found = covariance.projected(eye)[0].double().inverse()
        if rank == 2:
            found, exact = found.diag(), exact.diag()
        size = exact.abs().max().item()
        torch.testing.assert_close(found[weights], exact[weights], rtol=1e-2, atol=1e-3 * size)


def test_a_round_of_given_length_keeps_the_noise_that_it_was_trained_to() -> None:
    model = tiny_model((), 1, likelihood=bh.likelihoods.Normal(1.0, 2.0))
    first = bh.fit(model, "laplace", ratings(60, 0, 0.3), components=1, progress=False)
    short = first.update(ratings(40, 1, 2.0), max_steps=1)
    assert noise(short) == pytest.approx(noise(first), rel=0.05)
