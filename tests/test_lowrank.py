"""The low-rank guide against the exact posterior of a linear regression, correlations included."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from statistics import fmean
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from exact import Exact, hierarchical, own_network, random_texts, ratings, regression
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

import bhpeft_pyro as bh
from bhpeft_pyro.distributions import Covariance
from bhpeft_pyro.errors import GuideError, PriorError
from bhpeft_pyro.guides import LowRankGuide, NormalGuide
from bhpeft_pyro.inference import loop as optimise
from bhpeft_pyro.inference.curvature import narrowed
from bhpeft_pyro.inference.report import drifting
from bhpeft_pyro.priors import JOINT, JointPrior
from bhpeft_pyro.sequential.forgetting import Forgetting
from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_model, tiny_tokenizer

NOISE = 2.0
FIT: dict[str, Any] = {
    "max_steps": 300,
    "batch_size": 64,
    "particles": 4,
    "lr": 0.1,
    "warmup": 0.0,
    "progress": False,
}


def data(model: bh.Model, count: int = 64, seed: int = 3) -> bh.Examples:
    return ratings(model.network, random_texts(count, seed), seed=seed, noise=NOISE)


def fitted(rank: int = 32, **changes: Any) -> tuple[bh.Posterior, Exact]:
    model = regression(own_network(), noise=NOISE)
    examples = data(model)
    guide = bh.autoguide("lowrank", model, rank=rank)
    return bh.fit(model, guide, examples, **{**FIT, **changes}), Exact.of(model, examples)


def found(posterior: bh.Posterior) -> MultivariateNormal:
    """The posterior as a dense Normal, in float64; the sites lie as in `Exact`."""
    guide = posterior.guide
    if isinstance(guide, NormalGuide):
        means = torch.cat([value.flatten() for value in guide.means().values()])
        sds = torch.cat([value.flatten() for value in guide.scales().values()])
        return MultivariateNormal(means.double(), torch.diag(sds.double().square()))
    assert isinstance(guide, LowRankGuide)
    eye = torch.eye(len(guide.loc))
    covariance = torch.stack([guide.covariance.apply(row) for row in eye])
    return MultivariateNormal(guide.loc.detach().double(), covariance.double())


def exact_normal(exact: Exact) -> MultivariateNormal:
    return MultivariateNormal(exact.mean, exact.covariance)


def shape(posterior: bh.Posterior, exact: Exact) -> Tensor:
    """Variances, relative to the exact ones, along the axes in which both are independent."""
    half = torch.linalg.inv(torch.linalg.cholesky(exact.covariance))
    return torch.linalg.eigvalsh(half @ found(posterior).covariance_matrix @ half.T)


@pytest.fixture(scope="module")
def first() -> tuple[bh.Posterior, Exact]:
    return fitted()


def test_it_meets_the_exact_posterior_with_all_its_correlations(
    first: tuple[bh.Posterior, Exact],
) -> None:
    posterior, exact = first
    assert (exact.sd / exact.mean_field_sd).max() > 1.5  # correlations matter here
    assert ((found(posterior).mean - exact.mean) / exact.sd).abs().max() < 0.3
    # A covariance is measured on some 10^3 gradients: 5 % in a variance, along any of 17 axes.
    assert shape(posterior, exact).min() > 0.75 and shape(posterior, exact).max() < 1.3


def test_its_loss_is_the_log_evidence(first: tuple[bh.Posterior, Exact]) -> None:
    posterior, exact = first
    loss = posterior.report.last("loss", 100) * len(exact.y)
    assert loss == pytest.approx(-exact.log_evidence, abs=1.0)


def test_a_short_fit_s_loss_is_not_that_at_the_mean() -> None:
    """Which is below minus the log evidence, where no negative ELBO can be."""
    posterior, exact = fitted(max_steps=80)
    history, evidence = posterior.report.history, -exact.log_evidence / len(exact.y)
    assert [entry["draws"] for entry in history] == [FIT["particles"]] * 80
    assert posterior.report.last("loss") == fmean(entry["loss"] for entry in history[30:])
    assert posterior.report.last("loss") > evidence


def test_covariances_are_measured_from_the_first_step_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six times, evenly spread; each counts as much as those before it, and a fifth at least."""
    step, seen = optimise._Run._step, []
    done: list[int] = []

    def measured(*args: Any) -> Covariance:
        seen.append((len(done), args[-1]))
        return narrowed(*args)

    def stepped(run: Any, number: int, *rest: Any) -> Any:
        done.append(number)
        return step(run, number, *rest)

    monkeypatch.setattr(optimise, "narrowed", measured)
    monkeypatch.setattr(optimise._Run, "_step", stepped)
    fitted(max_steps=80)
    assert seen == [(0, 1.0), (14, 1 / 2), (28, 1 / 3), (42, 1 / 4), (56, 1 / 5), (70, 1 / 5)]


def test_more_directions_are_nearer_the_truth(first: tuple[bh.Posterior, Exact]) -> None:
    """Mean-field pays for its independence; a rank below the full one for what is left of it."""
    posterior, exact = first
    truth = exact_normal(exact)
    model = regression(own_network(), noise=NOISE)
    mean_field = bh.fit(model, "normal", data(model), **FIT)
    few, _ = fitted(rank=4)
    costs = [kl_divergence(found(p), truth).item() for p in (posterior, few, mean_field)]
    assert costs[0] < 0.2 < costs[2]
    assert costs[0] < costs[1] < costs[2]


def test_mini_batches_lead_to_the_same_posterior() -> None:
    posterior, exact = fitted(batch_size=16, max_steps=600)
    assert ((found(posterior).mean - exact.mean) / exact.sd).abs().max() < 0.5
    assert shape(posterior, exact).min() > 0.7 and shape(posterior, exact).max() < 1.4


def test_a_higher_temperature_is_a_wider_posterior() -> None:
    posterior, exact = fitted(temperature=4.0)
    wider = torch.linalg.inv(exact.x.T @ exact.x / (4 * NOISE**2) + torch.eye(17) / 0.7**2)
    ratio = found(posterior).covariance_matrix.diagonal() / wider.diagonal()
    assert ratio.log().abs().max() < 0.25


@pytest.mark.parametrize("swap", [False, True])
def test_two_updates_equal_one_fit_on_all_the_data(swap: bool) -> None:
    """With the full covariance, which mean-field guides do not pass on."""
    model = regression(own_network(), noise=NOISE)
    parts = [data(model, 64, 3), data(model, 48, 4)]
    together = Exact.of(model, parts[0].concat(parts[1]))
    parts = parts[::-1] if swap else parts
    guide = bh.autoguide("lowrank", model, rank=32)
    posterior = bh.fit(model, guide, parts[0], **FIT)
    before = found(posterior).covariance_matrix
    updated = posterior.update(parts[1])
    assert isinstance(updated.model.prior, JointPrior)
    torch.testing.assert_close(found(posterior).covariance_matrix, before)  # the old round stays
    assert ((found(updated).mean - together.mean) / together.sd).abs().max() < 0.4
    assert shape(updated, together).min() > 0.65 and shape(updated, together).max() < 1.4


def test_sds_still_on_their_way_are_named(first: tuple[bh.Posterior, Exact]) -> None:
    assert first[0].report.unsettled == []
    assert drifting({"settled": [0.0, -0.9, -1.0, -1.01], "moving": [0.0, -0.3, -0.6, -0.9]}) == [
        "moving"
    ]


def test_drift_is_held_against_what_forgetting_would_give(
    first: tuple[bh.Posterior, Exact],
) -> None:
    posterior = first[0]
    shifted = data(posterior.model, 32, seed=8)
    assert shifted.labels is not None
    assert not posterior.assess(shifted).surprising
    shifted.labels.mul_(-1).sub_(6)
    drift = posterior.assess(shifted)
    assert drift.surprising and drift.nll is not None
    # The wider the prior, the less is a shift like this beyond it.
    assert drift.alternatives[0.0] < drift.alternatives[0.5] < drift.nll.observed


@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
def test_forgetting_averages_whole_precision_matrices(
    keep: float, first: tuple[bh.Posterior, Exact]
) -> None:
    posterior = first[0]
    prior = Forgetting(keep)(posterior.as_prior(), posterior.first_prior, posterior.model.sites)
    assert isinstance(prior, JointPrior)
    q, start = found(posterior), torch.eye(17).double() / 0.7**2
    precision = keep * q.precision_matrix + (1 - keep) * start
    mean = torch.linalg.solve(precision, keep * q.precision_matrix @ q.mean)
    rows = torch.stack([prior.normal.covariance.apply(row) for row in torch.eye(17)]).double()
    torch.testing.assert_close(rows, torch.linalg.inv(precision), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(prior.normal.loc.double(), mean, atol=1e-4, rtol=1e-3)
    with pytest.raises(PriorError, match="has no parts"):
        Forgetting({"head.*": 0.5})(prior, posterior.first_prior, posterior.model.sites)


def test_the_kl_in_the_loss_is_that_of_the_dense_normals() -> None:
    posterior, _ = fitted(max_steps=30)
    prior = MultivariateNormal(torch.zeros(17).double(), 0.49 * torch.eye(17).double())
    expected = kl_divergence(found(posterior), prior).item()
    assert posterior.report.kl == {JOINT: pytest.approx(expected, rel=1e-3)}


def test_the_report_has_the_kl_of_each_sites_own_marginal() -> None:
    """Dense: the submatrix, with the correlations within a site. An update's prior has some too."""
    posterior, _ = fitted(max_steps=30)
    start = MultivariateNormal(torch.zeros(17).double(), 0.49 * torch.eye(17).double())
    updated = posterior.update(data(posterior.model, seed=8), **{**FIT, "max_steps": 30})
    for after, before in ((posterior, start), (updated, found(posterior))):
        q, parts = found(after), {"head.weight": slice(0, 16), "head.bias": slice(16, 17)}
        for name, part in parts.items():
            own, prior = (
                MultivariateNormal(normal.mean[part], normal.covariance_matrix[part, part])
                for normal in (q, before)
            )
            exact = kl_divergence(own, prior).item()
            assert after.report.marginal_kl[name] == pytest.approx(exact, rel=1e-3, abs=1e-4)
            assert f"{exact:.2f} nats" in str(after.report)
    assert sum(posterior.report.marginal_kl.values()) < posterior.report.kl[JOINT]


def test_transformer_weights_learn_and_are_saved(tmp_path: Path) -> None:
    model = tiny_model(bh.presets.bh_peft())
    quick = {"max_steps": 60, "lr": 0.1, "progress": False}
    posterior = bh.fit(model, "lowrank", tiny_examples(64), **quick)
    unseen = tiny_examples(100, seed=5)
    assert posterior.evaluate(unseen)["accuracy"] > 0.75
    assert posterior.guide.covariance.rank > 0  # type: ignore[union-attr,operator]
    again = posterior
    for round_ in range(2):  # the second time under a joint prior
        folder = posterior.save(tmp_path / str(round_))
        again = bh.Posterior.load(folder, tiny_backbone(), tokenizer=tiny_tokenizer())
        same = [p.predict(unseen, 4).probabilities for p in (posterior, again)]
        assert torch.equal(*same)
        posterior = again.update(tiny_examples(24, seed=9 + round_), max_steps=10)
    assert len(posterior.lineage) == 3


def test_a_loaded_guide_has_its_rank(tmp_path: Path) -> None:
    model = tiny_model(())
    guide = bh.autoguide("lowrank", model, rank=3)
    folder = bh.fit(model, guide, tiny_examples(), max_steps=2, progress=False).save(tmp_path / "a")
    loaded = bh.Posterior.load(folder, tiny_backbone(), tokenizer=tiny_tokenizer()).guide
    assert isinstance(loaded, LowRankGuide) and loaded.rank == 3


def test_priors_it_cannot_narrow_are_refused() -> None:
    with pytest.raises(GuideError, match=r"prior of '.*' is a Laplace, expected a Normal"):
        bh.autoguide("lowrank", tiny_model(prior=dist.Laplace(0.0, 0.1)))
    with pytest.raises(GuideError, match=r"also samples tau"):
        bh.autoguide("lowrank", tiny_model((), prior=hierarchical))
    with pytest.raises(GuideError, match=r"rank must be an integer of at least 1, got 0"):
        bh.autoguide("lowrank", tiny_model(), rank=0)


def test_a_joint_prior_is_matched_by_name_and_shape(first: tuple[bh.Posterior, Exact]) -> None:
    prior = first[0].as_prior()
    with pytest.raises(PriorError, match=r"site 'head.weight' has shape \(3, 16\)"):
        prior(bh.Head(3).sites(16))
    with pytest.raises(PriorError, match="there is none"):
        prior(tiny_model(bh.presets.lora(rank=2), outputs=1).sites)


def test_a_chain_of_rounds_does_not_hold_the_first_ones_covariances() -> None:
    """A divergence is remembered for as long as the prior is there, and no longer."""
    posterior, _ = fitted(max_steps=4)
    assert isinstance(posterior.guide, LowRankGuide)
    first = weakref.ref(posterior.guide.covariance)
    for seed in (8, 9):
        options = {**FIT, "max_steps": 4}
        posterior = posterior.update(data(posterior.model, seed=seed), **options)
    gc.collect()
    assert first() is None


def test_autocast_leaves_the_covariance_exact() -> None:
    torch.manual_seed(0)
    root = 30 * torch.randn(2000, 16) / 2000**0.5
    prior = Covariance.diagonal(torch.ones(2000))
    vector = torch.randn(2000)

    def made() -> tuple[Covariance, Covariance]:  # of which nothing is remembered yet
        one, two = (Covariance.from_precision(torch.ones(2000), k * root) for k in (1, 2))
        return one, two

    def found(one: Covariance, two: Covariance) -> list[Tensor]:
        return [one.divergence(prior), two.divergence(one), one.root(vector), one.unroot(vector)]

    exact, (one, two) = found(*made()), made()
    with torch.autocast("cpu", torch.bfloat16):
        again = found(one, two)
    for value, expected in zip(again, exact, strict=True):
        assert torch.equal(value, expected)


def test_variances_stay_positive_under_extreme_information() -> None:
    torch.manual_seed(0)
    covariance = Covariance.from_precision(torch.ones(3), 1e6 * torch.randn(3, 3))
    assert covariance.variance.min() > 0  # 1 - (1 - 1e-13) would be a rounding error below zero
    assert Covariance.diagonal(torch.full((3,), 2.0)).variance.tolist() == [4.0] * 3


def test_a_state_in_double_precision_is_loaded_in_that_of_the_guide() -> None:
    posterior = bh.fit(tiny_model(), "lowrank", tiny_examples(8), max_steps=10, progress=False)
    state = posterior.guide.state_dict()
    other = LowRankGuide(tiny_model())
    other.load_state_dict({name: value.double() for name, value in state.items()})
    for name, value in other.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, state[name])
    other(None)  # a double among them would not multiply
