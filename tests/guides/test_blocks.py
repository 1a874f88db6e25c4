"""Guides of blocks against the closed forms of a linear regression, and what they are made of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from exact import WIDTH, Exact, hierarchical, own_network, random_texts, ratings, regression
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import bhpeft_pyro as bh
from bhpeft_pyro.errors import GuideError, PriorError
from bhpeft_pyro.guides import BlockGuide, DeltaGuide, LowRankGuide, budget
from bhpeft_pyro.guides.guide import key
from bhpeft_pyro.inference.curvature import narrowed
from bhpeft_pyro.inference.passes import Feed
from bhpeft_pyro.priors import BlockPrior, PosteriorPrior
from bhpeft_pyro.sequential.forgetting import Forgetting
from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_model, tiny_tokenizer

NOISE, PRIOR_SD = 2.0, 0.7
FIT: dict[str, Any] = {
    "max_steps": 300,
    "batch_size": 64,
    "particles": 4,
    "lr": 0.1,
    "warmup": 0.0,
    "progress": False,
}
WEIGHT, BIAS = slice(0, WIDTH), slice(WIDTH, WIDTH + 1)
JOINT_WEIGHT = {"head.weight": "full", "head.bias": "normal"}
POINT_BIAS = {"head.bias": "delta", "head.weight": "full"}
MIXED = {
    "head.*": "full",
    "lora.*.A": ("lowrank", {"rank": 3}),
    "lora.*.B": ("delta", {"width": 0.05}),
    "*": "normal",
}
QUICK: dict[str, Any] = {"max_steps": 20, "lr": 0.1, "progress": False}


def data(model: bh.Model, count: int = 64, seed: int = 3) -> bh.Examples:
    return ratings(model.network, random_texts(count, seed), seed=seed, noise=NOISE)


def regress(families: Any, **changes: Any) -> tuple[bh.Posterior, Exact]:
    model = regression(own_network(), PRIOR_SD, NOISE)
    examples = data(model)
    return bh.fit(model, families, examples, **{**FIT, **changes}), Exact.of(model, examples)


def block_of(posterior: bh.Posterior, number: int) -> Any:
    guide = posterior.guide
    assert isinstance(guide, BlockGuide)
    return guide.blocks()[number]


def mean(posterior: bh.Posterior) -> Tensor:
    means = posterior.guide.means()  # type: ignore[operator]
    return torch.cat([means["head.weight"].flatten(), means["head.bias"]]).double()


def dense(block: LowRankGuide) -> Tensor:
    rows = [block.covariance.apply(row) for row in torch.eye(len(block.loc))]
    return torch.stack(rows).double()


def relative(found: Tensor, truth: Tensor) -> Tensor:
    """Variances, relative to the true ones, along the axes in which both are independent."""
    half = torch.linalg.inv(torch.linalg.cholesky(truth))
    return torch.linalg.eigvalsh(half @ found @ half.T)


@pytest.fixture(scope="module")
def blocks() -> tuple[bh.Posterior, Exact]:
    """A full covariance of the weight, and the bias apart: no block has all the correlations."""
    return regress(JOINT_WEIGHT)


@pytest.fixture(scope="module")
def mixed() -> bh.Posterior:
    return bh.fit(tiny_model(bh.presets.bh_peft()), MIXED, tiny_examples(48), **QUICK)


def test_a_full_block_of_the_head_is_the_exact_posterior() -> None:
    posterior, exact = regress({"head.*": "full"})
    assert (exact.sd / exact.mean_field_sd).max() > 1.5  # correlations matter here
    assert ((mean(posterior) - exact.mean) / exact.sd).abs().max() < 0.3
    # A covariance is measured on some 10^3 gradients: 5 % in a variance, along any of 17 axes.
    variances = relative(dense(block_of(posterior, 0)), exact.covariance)
    assert variances.min() > 0.75 and variances.max() < 1.3
    loss = posterior.report.last("loss", 100) * len(exact.y)
    assert loss == pytest.approx(-exact.log_evidence, abs=1.0)


def test_blocks_have_the_conditional_covariances(blocks: tuple[bh.Posterior, Exact]) -> None:
    """The optimum of q(w) q(b): the exact mean, and the inverses of the precision's blocks."""
    posterior, exact = blocks
    assert ((mean(posterior) - exact.mean) / exact.sd).abs().max() < 0.3
    conditional = torch.linalg.inv(exact.precision[WEIGHT, WEIGHT])
    marginal = exact.covariance[WEIGHT, WEIGHT]
    assert relative(marginal, conditional).max() > 2  # so the two are told apart below
    variances = relative(dense(block_of(posterior, 0)), conditional)
    assert variances.min() > 0.75 and variances.max() < 1.35
    sd = block_of(posterior, 1).scales()["head.bias"].item()
    assert sd == pytest.approx(exact.mean_field_sd[BIAS].item(), rel=0.15)
    assert exact.sd[BIAS].item() > 1.3 * exact.mean_field_sd[BIAS].item()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_a_point_is_the_map_estimate_given_the_rest(temperature: float) -> None:
    posterior, exact = regress(POINT_BIAS, temperature=temperature)
    tempered = Exact(exact.x, exact.y, PRIOR_SD / temperature**0.5, NOISE)  # T times the prior's
    found = mean(posterior)
    assert ((found - tempered.mean) / exact.sd).abs().max() < 0.3
    # Given the weight that was found the bias has a closed form, up to its optimiser's noise.
    rest = exact.y - exact.x[:, WEIGHT] @ found[WEIGHT]
    precision = len(rest) / NOISE**2 + temperature / PRIOR_SD**2
    bias = rest.sum() / NOISE**2 / precision
    assert abs(found[BIAS].item() - bias.item()) < 0.2 * precision**-0.5
    spread = torch.linalg.inv(tempered.precision[WEIGHT, WEIGHT]) * temperature
    variances = relative(dense(block_of(posterior, 1)), spread)
    assert variances.min() > 0.7 and variances.max() < 1.4


def test_one_normal_block_is_the_normal_guide() -> None:
    for model in (lambda: tiny_model(bh.presets.bh_peft()), lambda: tiny_model(())):
        fits = [
            bh.fit(model(), guide, tiny_examples(24), **QUICK)
            for guide in ("normal", {"*": "normal"})
        ]
        losses = [[entry["loss"] for entry in fit.report.history] for fit in fits]
        assert losses[0] == losses[1]
        assert fits[0].report.kl == fits[1].report.kl
        assert fits[0].report.scales == fits[1].report.scales
        texts = ["w5 w20", "w6 w21"]
        assert torch.equal(*(fit.predict(texts, 4).probabilities for fit in fits))


def test_normal_blocks_make_the_same_loss_as_one() -> None:
    model = tiny_model(prior=dist.Normal(0.0, 0.5))
    one = bh.autoguide("normal", model, init_scale=0.1)
    family = ("normal", {"init_scale": 0.1})
    many = bh.autoguide({"lora.*.A": family, "lora.*.B": family, "head.*": family}, model)
    state = {k.split(".", 2)[-1]: value for k, value in many.state_dict().items()}
    one.load_state_dict(state)
    feed = Feed(model, tiny_examples(8))
    batch = next(feed.training(8, 1, torch.Generator().manual_seed(0)))
    totals = []
    for guide in (one, many):
        elbo = bh.ELBO()
        elbo(model, guide)(batch)
        assert elbo.parts is not None
        totals.append(elbo.parts.kl)
    assert totals[0].keys() == totals[1].keys()
    for name, kl in totals[0].items():
        torch.testing.assert_close(totals[1][name], kl)


def test_the_kl_of_each_block_is_that_of_torch(blocks: tuple[bh.Posterior, Exact]) -> None:
    posterior, _ = blocks
    weight, bias = block_of(posterior, 0), block_of(posterior, 1)
    prior = torch.distributions.MultivariateNormal(
        torch.zeros(WIDTH).double(), PRIOR_SD**2 * torch.eye(WIDTH).double()
    )
    q = torch.distributions.MultivariateNormal(weight.loc.detach().double(), dense(weight))
    expected = Normal(bias.means()["head.bias"], bias.scales()["head.bias"])
    assert posterior.report.kl == {
        "weights[head.weight]": pytest.approx(kl_divergence(q, prior).item(), rel=1e-3),
        "head.bias": pytest.approx(kl_divergence(expected, Normal(0.0, PRIOR_SD)).item(), rel=1e-4),
    }
    report = str(posterior.report)
    assert "head.bias" in report and "a point" not in report


def test_a_point_costs_minus_its_log_prior_and_is_called_one() -> None:
    posterior, _ = regress(POINT_BIAS, max_steps=5)
    at = posterior.guide.means()["head.bias"]  # type: ignore[operator]
    cost = -Normal(0.0, PRIOR_SD).log_prob(at).item()
    assert posterior.report.kl["head.bias"] == pytest.approx(cost, rel=1e-5)
    assert posterior.report.points == ["head.bias"]
    assert list(posterior.report.scales) == ["head.weight"]
    assert f"head.bias    -log prior {cost:.2f} nats, a point" in str(posterior.report)


@pytest.mark.parametrize("swap", [False, True])
def test_two_updates_equal_one_fit_on_all_the_data(swap: bool) -> None:
    """The head's block has all the correlations, so nothing is lost between rounds."""
    model = regression(own_network(), PRIOR_SD, NOISE)
    parts = [data(model, 64, 3), data(model, 48, 4)]
    together = Exact.of(model, parts[0].concat(parts[1]))
    parts = parts[::-1] if swap else parts
    posterior = bh.fit(model, {"head.*": "full"}, parts[0], **FIT)
    before = dense(block_of(posterior, 0))
    updated = posterior.update(parts[1])
    torch.testing.assert_close(dense(block_of(posterior, 0)), before)  # the old round stays
    assert ((mean(updated) - together.mean) / together.sd).abs().max() < 0.4
    variances = relative(dense(block_of(updated, 0)), together.covariance)
    assert variances.min() > 0.65 and variances.max() < 1.4


def test_an_update_has_the_blocks_for_its_prior(blocks: tuple[bh.Posterior, Exact]) -> None:
    """The second round of a factorised posterior, in closed form: its blocks' precisions add up."""
    posterior, exact = blocks
    more = data(posterior.model, 48, 4)
    second = posterior.update(more)
    prior = second.model.prior
    assert isinstance(prior, BlockPrior)
    x = Exact.of(posterior.model, more).x
    weight, bias = block_of(posterior, 0), block_of(posterior, 1)
    precision = torch.zeros_like(exact.precision)
    precision[WEIGHT, WEIGHT] = torch.linalg.inv(dense(weight))
    precision[BIAS, BIAS] = bias.scales()["head.bias"].double().pow(-2)
    pull = precision @ mean(posterior)
    precision = precision + x.T @ x / NOISE**2
    assert more.labels is not None
    center = torch.linalg.solve(precision, pull + x.T @ more.labels.double() / NOISE**2)
    sd = torch.linalg.inv(precision).diagonal().sqrt()
    assert ((mean(second) - center) / sd).abs().max() < 0.4
    variances = relative(dense(block_of(second, 0)), torch.linalg.inv(precision[WEIGHT, WEIGHT]))
    assert variances.min() > 0.65 and variances.max() < 1.4


def test_a_block_is_forgotten_as_it_would_be_alone(blocks: tuple[bh.Posterior, Exact]) -> None:
    posterior, _ = blocks
    q, first, sites = posterior.as_prior(), posterior.first_prior, posterior.model.sites
    weight, bias = block_of(posterior, 0), block_of(posterior, 1)
    mixed = Forgetting({"*.weight": 0.3, "*.bias": 0.8})(q, first, sites)
    assert isinstance(mixed, BlockPrior)
    single, joint = mixed.parts
    assert isinstance(single, PosteriorPrior)
    sd = bias.scales()["head.bias"]
    variance = 1 / (0.8 * sd**-2 + 0.2 * PRIOR_SD**-2)
    torch.testing.assert_close(single.distributions["head.bias"].variance, variance)
    covariance = joint.normal.covariance  # type: ignore[union-attr]
    rows = torch.stack([covariance.apply(row) for row in torch.eye(WIDTH)]).double()
    eye = torch.eye(WIDTH).double()
    expected = torch.linalg.inv(0.3 * torch.linalg.inv(dense(weight)) + 0.7 * eye / PRIOR_SD**2)
    torch.testing.assert_close(rows, expected, atol=1e-4, rtol=1e-3)
    half = Forgetting({"*.bias": 0.5})(q, first, sites)
    assert torch.equal(half.parts[1].normal.loc, weight.loc)  # type: ignore[attr-defined]
    with pytest.raises(PriorError, match=r"joint posterior of head\.weight has no parts"):
        Forgetting(0.5, floor=0.1)(q, first, sites)


def test_points_need_a_width_to_be_a_prior(mixed: bh.Posterior) -> None:
    posterior, _ = regress(POINT_BIAS, max_steps=2)
    with pytest.raises(GuideError, match=r"no width.*width=\.\.\."):
        posterior.update(data(posterior.model, 8, 5))
    prior = mixed.as_prior()
    assert isinstance(prior, BlockPrior)
    single = prior.parts[0]
    assert isinstance(single, PosteriorPrior)
    point = single.distributions["lora.value.B"]
    unit = next(site.unit for site in mixed.model.sites if site.name == "lora.value.B")
    torch.testing.assert_close(point.mean, mixed.guide.means()["lora.value.B"])  # type: ignore[operator]
    torch.testing.assert_close(point.stddev, (0.05 * unit).expand(point.event_shape))
    with pytest.raises(GuideError, match="width must be positive, got 0"):
        bh.autoguide("delta", tiny_model(()), width=0)


def test_all_is_saved_bit_by_bit(mixed: bh.Posterior, tmp_path: Path) -> None:
    unseen = tiny_examples(30, seed=5)
    posterior = mixed
    for number in range(2):  # the second time under a prior of blocks
        folder = posterior.save(tmp_path / str(number))
        assert {file.suffix for file in folder.iterdir()} == {".json", ".safetensors"}
        again = bh.Posterior.load(folder, tiny_backbone(), tokenizer=tiny_tokenizer())
        own, loaded = posterior.guide.state_dict(), again.guide.state_dict()
        assert own.keys() == loaded.keys()
        assert all(torch.equal(own[name], loaded[name]) for name in own)
        assert isinstance(again.guide, BlockGuide)
        assert [block.options() for block in again.guide.blocks()] == [
            block.options()
            for block in posterior.guide.blocks()  # type: ignore[operator]
        ]
        assert again.report.points == posterior.report.points
        # The next round too is the same, to the last bit.
        following = [p.update(tiny_examples(24, seed=9 + number)) for p in (posterior, again)]
        assert torch.equal(*(p.predict(unseen, 4).probabilities for p in following))
        posterior = following[1]
    assert len(posterior.lineage) == 3


def test_a_coreset_and_new_labels() -> None:
    families = {"head.*": "normal", "*": ("delta", {"width": 0.1})}
    first = bh.fit(tiny_model(), families, tiny_examples(24), replay=bh.Replay(6), **QUICK)
    grown = first.grow(1)
    assert grown.guide.means()["head.weight"].shape == (3, 16)  # type: ignore[operator]
    updated = grown.update(tiny_examples(12, seed=4), max_steps=3)
    assert updated.predict(["w5"], 2).probabilities.shape == (1, 3)
    points = {"head.bias": ("delta", {"width": 0.1}), "*": "normal"}
    with pytest.raises(GuideError, match=r"DeltaGuide takes no new rows of head\.bias"):
        bh.fit(tiny_model(()), points, tiny_examples(), **QUICK).grow(1)


@pytest.mark.parametrize(
    ("name", "kinds", "random"),
    [
        ("down only", bh.presets.bh_peft(), ["lora.query.A", "lora.value.A", "adapter.down"]),
        ("down only", bh.presets.mam(), ["adapter.down", "prefix.down"]),
        ("A only", bh.presets.bh_peft(), ["lora.query.A", "lora.value.A"]),
    ],
)
def test_presets_leave_points(name: str, kinds: Any, random: list[str]) -> None:
    model = tiny_model(kinds)
    posterior = bh.fit(model, name, tiny_examples(48), **QUICK)
    assert sorted(posterior.report.scales) == sorted(random)
    points = {site.name for site in model.sites} - set(random)
    assert set(posterior.report.points) == points
    draws = posterior.sample(4)
    for site, values in draws.items():
        assert (values.std(0) > 0).all() == (site in random), site
    start = bh.autoguide(name, model).means()  # type: ignore[union-attr]
    moved = {site for site in points if not torch.equal(start[site], draws[site][0])}
    assert moved == points  # points are fitted
    assert posterior.predict(["w5 w20"], 4).epistemic.item() > 0


def test_presets_follow_a_priors_own_latents_and_take_a_width() -> None:
    model = tiny_model(prior=bh.priors.Hierarchical())
    guide = bh.autoguide("A only", model, width=0.1)
    normal, point = guide.blocks()  # type: ignore[union-attr]
    assert "lora.query.A.standard" in normal.means()
    assert "lora.query.B.log_scale" in point.means()
    assert point.options() == {"width": 0.1}
    with pytest.raises(GuideError, match=r"'A only' does not take \{'rank': 3\}"):
        bh.autoguide("A only", model, rank=3)
    for name in ("down only", "A only"):
        with pytest.raises(GuideError, match=r"nothing to be random.*sites: head\.weight"):
            bh.fit(tiny_model(()), name, tiny_examples(), **QUICK)


def test_peft_points_stay_while_the_head_is_fitted_on_frozen_features(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their prior alone would take them to its mode; at zero, B and A have no gradient."""
    from bhpeft_pyro.posterior import fit as fitting

    model = tiny_model(prior=dist.Normal(0.0, 0.01))
    guide = bh.autoguide({"head.*": "normal", "*": "delta"}, model)
    before = guide.means()  # type: ignore[union-attr]
    monkeypatch.setattr(fitting, "optimise", lambda *args: None)  # the fit proper
    bh.fit(model, guide, tiny_examples(), lr=0.1, **QUICK)
    after = guide.means()  # type: ignore[union-attr]
    for name in after:
        assert torch.equal(after[name], before[name]) == name.startswith("lora."), name
    assert all(parameter.requires_grad for parameter in guide.parameters())


def test_a_blocks_covariance_is_measured_at_draws_of_the_others() -> None:
    """With B at zero nothing can be told of A; with B away from it, there is something."""
    model = tiny_model(prior=dist.Normal(0.0, 0.5))
    guide = bh.autoguide({"lora.*.A": "lowrank", "*": "delta"}, model)
    assert isinstance(guide, BlockGuide)
    block, points = guide.blocks()
    assert isinstance(block, LowRankGuide) and isinstance(points, DeltaGuide)
    batches = list(Feed(model, tiny_examples(8)).training(8, 1, torch.Generator()))
    told = []
    for value in (0.0, 0.3):
        with torch.no_grad():
            for name in points.means():
                points.loc[key(name)].fill_(value)
            points.loc[key("head.weight")].copy_(torch.eye(2, WIDTH))
        covariance = narrowed(model, guide, block, batches, 8.0, 1.0)
        told.append(bool((covariance.variance < 0.25 - 1e-6).any()))
    assert told == [False, True]


@pytest.mark.parametrize(
    ("families", "message"),
    [
        ({"head.*": "normal"}, r"no pattern matches the site 'lora\.query\.A'; patterns: 'head"),
        ({}, r"no pattern matches the site 'lora\.query\.A'; patterns: none"),
        ({"haed.*": "full", "*": "normal"}, r"'haed\.\*' match no site.*lora\.query\.A"),
        ({"*": "normal", "head.*": "full"}, r"'head\.\*' match no site that an earlier"),
        ({"*": "mean-field"}, r"family 'mean-field' at '\*'; known: normal, lowrank, full, delta"),
        ({"*": "AutoNormal"}, r"unknown family 'AutoNormal'"),
        ({"*": 3}, r"expected a family's name at '\*', or a pair.*got 3"),
        ({"*": ("normal", 3)}, r"expected a family's name at '\*', or a pair"),
        ({"*": ("full", {"rank": 3})}, r"'full' at '\*' does not take \{'rank': 3\}"),
        ({"*": ("lowrank", {"rank": 0})}, r"rank must be an integer of at least 1, got 0"),
    ],
)
def test_bad_blocks_are_refused(families: Mapping[str, Any], message: str) -> None:
    with pytest.raises(GuideError, match=message):
        bh.fit(tiny_model(), families, tiny_examples(), **QUICK)


def test_blocks_that_cannot_follow_the_prior_are_refused(
    blocks: tuple[bh.Posterior, Exact],
) -> None:
    with pytest.raises(GuideError, match="also samples tau"):
        bh.autoguide({"tau": "normal", "*": "full"}, tiny_model((), prior=hierarchical))
    with pytest.raises(GuideError, match=r"prior of 'head.bias' is a Laplace, expected a Normal"):
        prior = {"head.bias": dist.Laplace(0.0, 1.0), "*": dist.Normal(0.0, 1.0)}
        bh.autoguide({"head.bias": "lowrank", "*": "normal"}, tiny_model((), prior=prior))
    whole, _ = regress({"head.*": "full"}, max_steps=2)
    model = bh.Model(whole.model.network, whole.as_prior(), whole.model.likelihood)
    with pytest.raises(GuideError, match=r"holds head\.weight, head\.bias together"):
        bh.autoguide(JOINT_WEIGHT, model)
    with pytest.raises(PriorError, match=r"has no site lora\.query\.A"):
        blocks[0].as_prior()(tiny_model(outputs=1).sites)
    with pytest.raises(GuideError, match=r"a mapping does not take \{'rank': 3\}"):
        bh.autoguide({"*": "lowrank"}, tiny_model(), rank=3)


def test_the_budget_is_that_of_all_blocks() -> None:
    model = tiny_model()
    size = {site.name: site.numel for site in model.sites}
    head = size["head.weight"] + size["head.bias"]
    rest = sum(size.values()) - head
    full, normal = budget("full", head), budget("normal", rest)
    assert full is not None and normal is not None
    families = {"head.*": "full", "*": "normal"}
    bh.autoguide(families, model, max_bytes=full.bytes + normal.bytes)
    message = rf"'full'.*would take {sum(size.values())} latents, {head + 2 * rest} parameters"
    with pytest.raises(GuideError, match=message):
        bh.autoguide(families, model, max_bytes=full.bytes + normal.bytes - 1)
