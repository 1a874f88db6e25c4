"""Another family of guides in a later round: what is kept is exact, what is lost is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from exact import WIDTH, Exact, flat, own_network, random_texts, ratings, regression
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

import bhpeft_pyro as bh
from bhpeft_pyro.distributions import Covariance, LowRankNormal
from bhpeft_pyro.errors import GuideError, PriorError
from bhpeft_pyro.guides import BlockGuide, FullGuide, LaplaceGuide, LowRankGuide, NormalGuide
from bhpeft_pyro.priors import BlockPrior, JointPrior, PosteriorPrior
from bhpeft_pyro.sequential import projected
from bhpeft_pyro.sequential.projection import in_family
from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_model, tiny_tokenizer

NOISE = 2.0
FIT: dict[str, Any] = {
    "max_steps": 200,
    "batch_size": 64,
    "particles": 4,
    "lr": 0.1,
    "warmup": 0.0,
    "progress": False,
}
QUICK: dict[str, Any] = {"max_steps": 6, "lr": 0.1, "progress": False}
SHAPES = {"a": (2, 3), "b": (4,), "c": (2,)}
PLACES = {"a": slice(0, 6), "b": slice(6, 10), "c": slice(10, 12)}


def correlated() -> JointPrior:
    """A Normal over three sites with correlations between any two weights."""
    generator = torch.Generator().manual_seed(0)
    diagonal = 0.5 + torch.rand(12, generator=generator)
    root = 2 * torch.randn(12, 5, generator=generator)
    loc = torch.randn(12, generator=generator)
    return JointPrior(LowRankNormal(loc, Covariance.from_precision(diagonal, root)), SHAPES)


def covariance(normal: LowRankNormal) -> Tensor:
    rows = torch.eye(len(normal.loc))
    return torch.stack([normal.covariance.apply(row) for row in rows]).double()


def dense(prior: Any) -> MultivariateNormal:
    """Any of our priors over the three sites, in their order."""
    mean, matrix = torch.zeros(12).double(), torch.zeros(12, 12).double()
    for part in prior.parts if isinstance(prior, BlockPrior) else [prior]:
        if isinstance(part, JointPrior):
            at = torch.cat([torch.arange(12)[PLACES[name]] for name in part.shapes])
            mean[at] = part.normal.loc.double()
            matrix[at[:, None], at] = covariance(part.normal)
        else:
            for name, site in part.distributions.items():
                mean[PLACES[name]] = site.mean.flatten().double()
                at = torch.arange(12)[PLACES[name]]
                matrix[at, at] = site.variance.flatten().double()
    return MultivariateNormal(mean, matrix)


@pytest.mark.parametrize("together", [[], [["a", "c"]], [["b", "a"], ["c"]], [["a", "b", "c"]]])
def test_the_nearest_has_the_same_moments_within_groups(together: list[list[str]]) -> None:
    last = correlated()
    found, divergence = projected(last, together)
    q, p = dense(last), dense(found)
    group_of = {name: number for number, group in enumerate(together) for name in group}
    kept = torch.eye(12, dtype=torch.bool)
    for one, first in PLACES.items():
        for other, second in PLACES.items():
            if one in group_of and group_of[one] == group_of.get(other):
                kept[first, second] = True
    torch.testing.assert_close(p.mean, q.mean)
    expected = q.covariance_matrix * kept
    torch.testing.assert_close(p.covariance_matrix, expected, atol=1e-6, rtol=1e-4)
    assert divergence == pytest.approx(kl_divergence(q, p).item(), rel=1e-4, abs=1e-5)
    assert (divergence == 0) == (len(together) == 1 and len(together[0]) == 3)
    # Nothing of that form is nearer: neither a shift of the means nor other widths.
    for scale, shift in ((1.05, 0.0), (0.95, 0.0), (1.0, 0.01)):
        other = MultivariateNormal(p.mean + shift, scale * p.covariance_matrix)
        assert kl_divergence(q, other) > divergence


def test_blocks_are_held_whole_by_a_larger_group() -> None:
    """Independent blocks, and weights on their own, as one Normal: nothing is lost."""
    blocks, _ = projected(correlated(), [["a", "b"]])
    assert isinstance(blocks, BlockPrior)
    whole, divergence = projected(blocks, [["c", "a", "b"]])
    assert isinstance(whole, JointPrior) and divergence == 0
    here, there = dense(blocks), dense(whole)
    torch.testing.assert_close(here.mean, there.mean)
    torch.testing.assert_close(here.covariance_matrix, there.covariance_matrix)
    with pytest.raises(PriorError, match="no closed form in another family"):
        projected(lambda sites: {}, [])


def test_a_marginal_is_as_narrow_as_it_should_be() -> None:
    """Single precision has no room for 1 - 1e-6."""
    sharp = Covariance.from_precision(torch.ones(6), 1e3 * torch.eye(6)[:, :4])
    half = sharp.marginal(torch.tensor([0, 1, 5]))
    torch.testing.assert_close(half.ratio, torch.tensor([1e-3, 1e-3]), rtol=1e-2, atol=0)


def data(model: bh.Model, count: int, seed: int) -> bh.Examples:
    return ratings(model.network, random_texts(count, seed), seed=seed, noise=NOISE)


def gaussian(posterior: bh.Posterior) -> MultivariateNormal:
    """What a guide over the head is, in the order of `Exact`."""
    guide = posterior.guide
    mean = flat(guide.means())  # type: ignore[operator]
    if isinstance(guide, LowRankGuide):
        return MultivariateNormal(mean, covariance(guide.as_prior().normal))
    return MultivariateNormal(mean, torch.diag(flat(guide.scales()).square()))  # type: ignore[operator]


def following(prior: MultivariateNormal, model: bh.Model, more: bh.Examples) -> MultivariateNormal:
    """The exact posterior of linear regression under a Normal prior."""
    x = Exact.of(model, more).x
    assert more.labels is not None
    precision = prior.precision_matrix + x.T @ x / NOISE**2
    pull = prior.precision_matrix @ prior.mean + x.T @ more.labels.double() / NOISE**2
    return MultivariateNormal(torch.linalg.solve(precision, pull), precision_matrix=precision)


def relative(found: MultivariateNormal, truth: MultivariateNormal) -> Tensor:
    """Variances, relative to the true ones, along the axes in which both are independent."""
    half = torch.linalg.inv(torch.linalg.cholesky(truth.covariance_matrix))
    return torch.linalg.eigvalsh(half @ found.covariance_matrix @ half.T)


@pytest.mark.parametrize("family", ["full", "lowrank"])
def test_a_joint_guide_takes_over_a_normal_posterior_as_it_is(family: str) -> None:
    model = regression(own_network(), noise=NOISE)
    first = bh.fit(model, "normal", data(model, 64, 3), **FIT)
    more = data(model, 48, 4)
    second = first.update(more, guide=family)
    assert second.report.projection == 0.0 and "as it is" in str(second.report)
    truth = following(gaussian(first), model, more)
    found = gaussian(second)
    sd = truth.variance.sqrt()
    assert ((found.mean - truth.mean) / sd).abs().max() < 0.4
    assert relative(found, truth).min() > 0.65 and relative(found, truth).max() < 1.4
    assert isinstance(first.guide, NormalGuide)  # the old round stays


def test_a_normal_guide_takes_over_the_marginals_of_a_full_posterior() -> None:
    model = regression(own_network(), noise=NOISE)
    first = bh.fit(model, "full", data(model, 64, 3), **FIT)
    more = data(model, 48, 4)
    second = first.update(more, guide="normal")
    q = gaussian(first)
    p = MultivariateNormal(q.mean, torch.diag(q.variance))
    lost = kl_divergence(q, p).item()
    assert lost > 1  # there are correlations to lose
    assert second.report.projection == pytest.approx(lost, rel=1e-3)
    assert f"{lost:.2f} nats away from it" in str(second.report)
    truth = following(p, model, more)
    assert isinstance(second.guide, NormalGuide)
    sds = flat(second.guide.scales())
    best = truth.precision_matrix.diagonal().rsqrt()  # of the nearest independent Normals
    assert ((flat(second.guide.means()) - truth.mean) / truth.variance.sqrt()).abs().max() < 0.4
    assert (sds / best).log().abs().max() < 0.15
    third = second.update(data(model, 32, 5), max_steps=3)
    assert isinstance(third.guide, NormalGuide) and third.report.projection is None


def test_from_blocks_to_one_and_back_no_evidence_is_lost_but_what_is_said() -> None:
    """Blocks, all together, other blocks: each prior is the exact conjugate one of its form."""
    model = regression(own_network(), noise=NOISE)
    posterior = bh.fit(
        model, {"head.weight": "full", "head.bias": "normal"}, data(model, 64, 3), **QUICK
    )
    whole = posterior.update(data(model, 48, 4), guide="full", max_steps=40)
    assert whole.report.projection == 0.0 and isinstance(whole.guide, FullGuide)
    apart = whole.update(data(model, 32, 5), guide={"*.bias": "normal", "*": "full"}, max_steps=40)
    q = gaussian(whole)
    blocks = torch.zeros_like(q.covariance_matrix)
    for part in (slice(0, WIDTH), slice(WIDTH, WIDTH + 1)):
        blocks[part, part] = q.covariance_matrix[part, part]
    lost = kl_divergence(q, MultivariateNormal(q.mean, blocks)).item()
    assert apart.report.projection == pytest.approx(lost, rel=1e-3)
    assert isinstance(apart.guide, BlockGuide)


FAMILIES: list[Any] = [
    "normal",
    "lowrank",
    "laplace",
    "full",
    {"head.*": "full", "lora.*.A": ("lowrank", {"rank": 3}), "*": "normal"},
    {"lora.*": ("lowrank", {"rank": 2}), "*": ("delta", {"width": 0.1})},
]
CLASSES = {
    "normal": NormalGuide,
    "lowrank": LowRankGuide,
    "laplace": LaplaceGuide,
    "full": FullGuide,
}


@pytest.mark.parametrize("old", FAMILIES, ids=str)
def test_any_family_starts_where_any_other_was(old: Any) -> None:
    first = bh.fit(tiny_model(), old, tiny_examples(16), components=1, **QUICK)
    model, last = first.model, first.as_prior()
    means = first.guide.means()  # type: ignore[operator]
    for new in FAMILIES:
        guide, prior, divergence = in_family(model, last, new, seed=0)
        assert type(guide) is CLASSES.get(str(new), BlockGuide)
        assert all(torch.equal(guide.means()[name], value) for name, value in means.items())
        # A second time there is nothing left to lose.
        assert divergence >= 0 == in_family(model, prior, new, seed=0)[2]


def test_a_round_of_another_family_is_saved_forgets_and_replays(tmp_path: Path) -> None:
    posterior = bh.fit(tiny_model(), "normal", tiny_examples(16), replay=bh.Replay(4), **QUICK)
    for number, new in enumerate([*FAMILIES[1:], "normal"]):
        options: Any = {"keep": 0.7} if number % 2 else {"replay": bh.Replay(3)}
        data = tiny_examples(12, seed=1 + number)
        posterior = posterior.update(data, guide=new, max_steps=2, **options)
        folder = posterior.save(tmp_path / str(number))
        again = bh.Posterior.load(folder, tiny_backbone(), tokenizer=tiny_tokenizer())
        assert again.report == posterior.report and again.report.projection is not None
        more, unseen = tiny_examples(12, seed=20), tiny_examples(20, seed=9)
        here, there = (p.update(more, replay=bh.Replay(3)) for p in (posterior, again))
        assert torch.equal(*(p.predict(unseen, 4).probabilities for p in (here, there)))
        assert type(there.guide) is CLASSES.get(str(new), BlockGuide)


def test_what_cannot_take_over_is_refused() -> None:
    first = bh.fit(tiny_model(()), "full", tiny_examples(), **QUICK)
    more = tiny_examples(12, seed=1)
    with pytest.raises(GuideError, match="unknown guide 'fuller'"):
        first.update(more, guide="fuller")
    with pytest.raises(GuideError, match=r"no pattern matches the site 'head\.bias'"):
        first.update(more, guide={"*.weight": "full"})
    scaled = bh.fit(tiny_model(prior=bh.priors.Hierarchical()), "normal", tiny_examples(), **QUICK)
    with pytest.raises(GuideError, match="also samples"):
        scaled.update(more, guide="lowrank")
    # What has no correlations keeps all it has, a prior's own scales included.
    again = scaled.update(more, guide={"*": "normal"})
    assert isinstance(again.model.prior, PosteriorPrior) and again.report.projection == 0.0
