"""Many rounds against the closed form: nothing lost, nothing counted twice, any order."""

from __future__ import annotations

from itertools import pairwise, permutations
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from onehot import FIT, assert_posterior, exact, exactly, model, words

import bhpeft_pyro as bh
from bhpeft_pyro.base.distributions import Covariance, LowRankNormal
from bhpeft_pyro.errors import ConfigError
from bhpeft_pyro.posterior.forgetting import forget
from bhpeft_pyro.posterior.replay import seen_by, set_aside
from bhpeft_pyro.priors import JointPrior, as_prior
from bhpeft_pyro.testing import tiny_examples, tiny_model

ROUNDS = [words(count, seed) for count, seed in ((48, 1), (32, 2), (64, 3), (48, 4))]


def in_rounds(order: tuple[int, ...], replay: Any = None, **options: Any) -> list[bh.Posterior]:
    """All rounds in an order; the posteriors after each."""
    posterior = bh.fit(model(), "normal", ROUNDS[order[0]], replay=replay, **FIT)
    posteriors = [posterior]
    for index in order[1:]:
        posteriors.append(posteriors[-1].update(ROUNDS[index], replay=replay, **options))
    return posteriors


@pytest.fixture
def exact_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    exactly(monkeypatch)


def test_rounds_with_forgetting_through_the_whole_stack() -> None:
    """Real fits; their errors are half of what is allowed, and the seed is fixed."""
    last = in_rounds((0, 1, 2), keep=0.5)[-1]
    parts = [(data, 0.5 ** (2 - i)) for i, data in enumerate(ROUNDS[:3])]
    assert_posterior(last.guide, parts, tolerance=0.6)
    mean_ratio = (last.guide.scales()["head.weight"][0] / exact(parts)[1]).log().mean()  # type: ignore[operator]
    assert abs(mean_ratio) < 0.08  # with nothing forgotten it would be -0.2


@pytest.mark.usefixtures("exact_fits")
@pytest.mark.parametrize("order", list(permutations(range(4)))[::5])
def test_rounds_in_any_order_equal_one_fit_on_everything(order: tuple[int, ...]) -> None:
    assert_posterior(in_rounds(order)[-1].guide, [(data, 1.0) for data in ROUNDS])


@pytest.mark.usefixtures("exact_fits")
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.9])
def test_old_evidence_counts_by_powers_of_keep(keep: float) -> None:
    last = in_rounds((0, 1, 2, 3), keep=keep)[-1]
    parts = [(data, keep ** (3 - i)) for i, data in enumerate(ROUNDS)]
    assert_posterior(last.guide, parts)
    assert last.report.keep == keep


@pytest.mark.usefixtures("exact_fits")
def test_what_is_forgotten_is_chosen_by_site() -> None:
    kept, forgotten = (
        in_rounds((0, 1), keep=keep)[-1].guide for keep in ({"*.bias": 0.5}, {"*.weight": 0.5})
    )
    assert_posterior(kept, [(ROUNDS[0], 1.0), (ROUNDS[1], 1.0)])
    assert_posterior(forgotten, [(ROUNDS[0], 0.5), (ROUNDS[1], 1.0)])


@pytest.mark.usefixtures("exact_fits")
def test_replay_counts_every_example_once() -> None:
    posteriors = in_rounds((0, 1, 2, 3), 20)
    everything = [(data, 1.0) for data in ROUNDS]
    for number, posterior in enumerate(posteriors, 1):
        assert posterior.coreset is not None
        kept = posterior.coreset.examples
        assert len(kept) == 20
        assert_posterior(posterior.guide, everything[:number])
        # The core has learnt all but the coreset, and that alone goes on to the next round.
        assert_posterior(posterior.coreset.guide, [*everything[:number], (kept, -1.0)])
    for last, following in pairwise(posteriors):
        prior = following.model.prior.distributions["head.weight"]  # type: ignore[attr-defined]
        core = last.coreset.guide.distributions()["head.weight"]  # type: ignore[union-attr, operator]
        assert torch.equal(prior.mean, core.mean) and torch.equal(prior.variance, core.variance)


def test_a_random_coreset_is_a_sample_of_all_rounds() -> None:
    """By the pool alone, few of the earlier rounds' examples would stay in it."""
    sizes, seeds = torch.tensor([50, 100, 30, 20]), 40
    tokenizer, counts = model().network.tokenizer, torch.zeros(4)
    for seed in range(seeds):
        kept = None
        for number, size in enumerate(sizes.tolist()):  # each round has a word of its own
            rows = {"text": [f"w{5 + number}"] * size, "label": [0.0] * size}
            pool = bh.data.encode(rows, tokenizer, kind="rating")
            old, seen = (0, 0) if kept is None else (len(kept), int(sizes[:number].sum()))
            pool = pool if kept is None else pool.concat(kept)
            kept, rest = set_aside(pool, 20, 4 * seed + number, old, seen)
            assert len(kept) == 20 and len(rest) == len(pool) - 20
        assert kept is not None
        counts += torch.tensor([kept.texts.count(f"w{5 + number}") for number in range(4)])
    share = sizes / sizes.sum()
    error = (20 * share * (1 - share) * seeds).sqrt()  # at most, as none is drawn twice
    assert ((counts - 20 * seeds * share).abs() < 4 * error).all(), counts


def test_rounds_before_the_first_coreset_have_no_share_of_later_ones() -> None:
    quick: Any = {"max_steps": 1, "progress": False}
    posterior, found = bh.fit(model(), "normal", ROUNDS[1], **quick), []
    for data in (ROUNDS[0], ROUNDS[2], ROUNDS[3]):
        posterior = posterior.update(data, replay=5)
        found.append(seen_by(posterior.lineage))
    assert found == [48, 48 + 64, 48 + 64 + 48]
    begun = bh.fit(model(), "normal", ROUNDS[1], replay=5, **quick).update(ROUNDS[0], replay=5)
    assert seen_by(begun.lineage) == 32 + 48


@pytest.mark.usefixtures("exact_fits")
def test_without_replay_the_coreset_stays_learnt() -> None:
    first = bh.fit(model(), "normal", ROUNDS[0], replay=20, **FIT)
    second = first.update(ROUNDS[2])
    assert second.coreset is None
    assert_posterior(second.guide, [(ROUNDS[0], 1.0), (ROUNDS[2], 1.0)])
    third = second.update(ROUNDS[3], replay=20)
    assert_posterior(third.guide, [(ROUNDS[i], 1.0) for i in (0, 2, 3)])


def test_bad_replay_is_refused() -> None:
    with pytest.raises(ConfigError, match="replay=0 must be an integer"):
        bh.fit(model(), "normal", ROUNDS[0], replay=0, **FIT)
    with pytest.raises(ConfigError, match="replay=48 must be below the number of examples, 48"):
        bh.fit(model(), "normal", ROUNDS[0], replay=48, **FIT)


def test_the_first_prior_acts_on_few_rows_only() -> None:
    """The round counts as a whole, whatever is kept of it for replay."""
    options: dict[str, Any] = {"components": 1, "max_steps": 2, "progress": False}
    first = bh.fit(tiny_model(()), "laplace", tiny_examples(80), replay=6, **options)
    second = first.update(tiny_examples(100, seed=1), replay=60)
    third = second.update(tiny_examples(40, seed=2), replay=60)
    used = [
        (each.report.temperature, each.coreset.report.temperature)  # type: ignore[union-attr]
        for each in (first, second, third)
    ]
    assert used == [(0, 1), (0, 0), (1, 1)]


def test_a_coreset_does_not_set_the_noise_scale() -> None:
    """One outlier that is kept would make all forecasts as wide as it is wrong."""
    rows = {
        "text": [f"w{5 + i % 40} w{5 + i // 40}" for i in range(60)],
        "label": [float(i % 3) for i in range(60)],
    }
    small = tiny_model((), 1, likelihood=bh.likelihoods.Normal(0.0, 9.0))
    options: Any = {"components": 1, "max_steps": 3, "lr": 1e-6, "progress": False}
    kept, _ = set_aside(small.encode(rows), 1, seed=0)
    assert kept.texts is not None
    rows["label"][rows["text"].index(kept.texts[0])] = 20.0
    fitted = bh.fit(small, "laplace", rows, replay=1, **options)
    assert fitted.coreset is not None
    noises = [each.means()["noise.log_scale"] for each in (fitted.guide, fitted.coreset.guide)]
    torch.testing.assert_close(*noises, rtol=0.0, atol=1e-3)


@pytest.mark.parametrize("ratio", [0.1, 0.01, 0.001])
def test_a_sharp_joint_posterior_keeps_its_mean_when_a_part_is_forgotten(ratio: float) -> None:
    """Sums of precision times mean lose it in float32: 90 nats of it at a ratio of 0.003."""
    sites = tiny_model(()).sites
    size, shapes = sum(site.numel for site in sites), {site.name: site.shape for site in sites}
    torch.manual_seed(0)
    axes = torch.linalg.qr(torch.randn(size, 5))[0]
    root, loc = axes * (ratio**-2 - 1) ** 0.5, torch.randn(size)
    old = LowRankNormal(loc, Covariance.from_precision(torch.ones(size), root))
    first = as_prior(dist.Normal(0.5, 1.0))
    mixed = forget(0.9, JointPrior(old, shapes), first, sites)
    assert isinstance(mixed, JointPrior)
    unit = torch.eye(size).double()
    precision = 0.9 * (unit + root.double() @ root.double().T)
    pull = precision @ loc.double() + 0.1 * torch.full((size,), 0.5).double()
    away = mixed.normal.mean.double() - torch.linalg.solve(precision + 0.1 * unit, pull)
    assert away @ precision @ away / 2 < 1e-3  # nats


@pytest.mark.parametrize("keep", ["0.9", None])
def test_shares_are_numbers(keep: Any) -> None:
    posterior = bh.fit(model(), "normal", ROUNDS[0], max_steps=1, progress=False)
    expected = "keep=.* must be a finite number of at least 0 and at most 1"
    with pytest.raises(ConfigError, match=expected):
        posterior.update(ROUNDS[1], keep=keep)
