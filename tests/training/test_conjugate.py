"""Fits against Bayesian linear regression, where everything has a closed form.

Tolerances: a fit is stochastic, so means are compared in units of the posterior sd, and sds by
their ratio, for every weight and in the geometric mean over all. Measured errors are half of
what is allowed, and the seeds are fixed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exact import (
    Designed,
    Exact,
    flat,
    one_word_texts,
    orthogonal_network,
    own_network,
    random_texts,
    ratings,
    regression,
)

import bhpeft_pyro as bh
from bhpeft_pyro.guides import MeanFieldGuide

Rounds = tuple[bh.data.Examples, bh.data.Examples]
FIT: dict[str, Any] = {
    "max_steps": 300,
    "batch_size": 32,
    "particles": 4,
    "lr": 0.1,
    "progress": False,
}


def moments(posterior: bh.Posterior) -> tuple[torch.Tensor, torch.Tensor]:
    guide = posterior.guide
    assert isinstance(guide, MeanFieldGuide)
    return flat(guide.means()), flat(guide.scales())


def assert_close(
    posterior: bh.Posterior, mean: torch.Tensor, sd: torch.Tensor, rounds: int = 1
) -> None:
    """Each round adds its own error."""
    found_mean, found_sd = moments(posterior)
    ratio = (found_sd / sd).log()
    assert ((found_mean - mean) / sd).abs().max() < 0.3 * rounds
    assert ratio.abs().max() < 0.25 * rounds
    assert ratio.mean().abs() < 0.06 * rounds


@pytest.fixture(scope="module")
def network() -> Designed:
    return orthogonal_network()


@pytest.fixture(scope="module")
def rounds(network: Designed) -> Rounds:
    """Two rounds of unequal size; the second holds every text twice."""
    return (
        ratings(network, one_word_texts(), seed=1),
        ratings(network, one_word_texts() * 2, seed=2),
    )


@pytest.fixture(scope="module")
def first(network: Designed, rounds: Rounds) -> bh.Posterior:
    return bh.fit(regression(network), "normal", rounds[0], **FIT)


def test_mean_field_meets_the_exact_posterior_where_it_can(
    first: bh.Posterior, rounds: Rounds
) -> None:
    exact = Exact.of(first.model, rounds[0])
    torch.testing.assert_close(exact.sd, exact.mean_field_sd)  # the design is orthogonal
    assert_close(first, exact.mean, exact.sd)


def test_the_loss_at_the_exact_posterior_is_the_log_evidence(
    network: Designed, rounds: Rounds
) -> None:
    model, data = regression(network), rounds[0]
    exact = Exact.of(model, data)
    guide = MeanFieldGuide(model)
    with torch.no_grad():
        for name, part in (("head/weight", slice(0, 16)), ("head/bias", slice(16, 17))):
            shape = guide.loc[name].shape
            guide.loc[name].copy_(exact.mean[part].reshape(shape))
            guide.log_scale[name].copy_(exact.sd[part].log().reshape(shape))
    batch = bh.data.Batch({}, data.labels, size=len(data), features=exact.x[:, :16].float())
    with torch.no_grad():
        loss = bh.training.ELBO(num_particles=20_000)(model, guide)(batch)
    # The sd of one draw's nll is that of a quadratic form of 17 weights, sqrt(17 / 2) = 3 nats
    # at most; of the mean of 20,000 draws 0.02.
    assert loss.item() == pytest.approx(-exact.log_evidence, abs=0.1)


def test_the_loss_of_a_fit_is_the_log_evidence(first: bh.Posterior, rounds: Rounds) -> None:
    exact = Exact.of(first.model, rounds[0])
    loss = first.report.last("loss", 200) * len(rounds[0])
    assert loss == pytest.approx(-exact.log_evidence, abs=1.5)  # 200 steps of sd 4


def test_mean_field_on_correlated_features_has_the_exact_mean_and_conditional_sds() -> None:
    model = regression(own_network(), noise=2.0)
    data = ratings(model.network, random_texts(64), seed=3, noise=2.0)
    exact = Exact.of(model, data)
    assert (exact.sd / exact.mean_field_sd).max() > 1.5  # so the two are told apart below
    posterior = bh.fit(model, "normal", data, **{**FIT, "max_steps": 600, "batch_size": 64})
    assert_close(posterior, exact.mean, exact.mean_field_sd)


def test_mini_batches_lead_to_the_same_posterior(network: Designed, rounds: Rounds) -> None:
    # 64 examples in batches of at most 12: six of 11 or 12, some examples appear twice.
    exact = Exact.of(regression(network), rounds[1])
    posterior = bh.fit(
        regression(network), "normal", rounds[1], **{**FIT, "batch_size": 12, "max_steps": 600}
    )
    assert_close(posterior, exact.mean, exact.sd)


def test_an_update_on_its_own_data_again_sharpens_it(first: bh.Posterior, rounds: Rounds) -> None:
    # Bayes cannot know that it has seen the data before: the precision of the data counts twice.
    exact = Exact.of(first.model, rounds[0].concat(rounds[0]))
    assert_close(first.update(rounds[0], again=True), exact.mean, exact.sd, rounds=2)
