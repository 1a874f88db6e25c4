"""The shift from prior to posterior, against the guide's own numbers."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import bhpeft_pyro as bh
from bhpeft_pyro import priors
from bhpeft_pyro.diagnostics.changes import shifts
from bhpeft_pyro.errors import GuideError, PriorError
from bhpeft_pyro.guides import FunctionGuide, NormalGuide
from bhpeft_pyro.peft import Adapter, LoRA
from bhpeft_pyro.peft.sites import Site
from bhpeft_pyro.testing import tiny_examples, tiny_model

KINDS = (LoRA(("query",), rank=2), Adapter(3, layers=(1,)))


@pytest.fixture(scope="module")
def rounds() -> tuple[bh.Posterior, bh.Posterior]:
    first = bh.fit(tiny_model(KINDS), "normal", tiny_examples(), max_steps=5, progress=False)
    return first, first.update(tiny_examples(8, seed=1), max_steps=20)


def test_layers_keep_their_numbers(rounds: tuple[bh.Posterior, bh.Posterior]) -> None:
    layers = {kind: list(by_layer) for kind, by_layer in shifts(rounds[0]).items()}
    assert layers == {"lora": [0, 1], "adapter": [1], "head": [None]}


@pytest.mark.parametrize("number", [0, 1])
def test_kls_sum_to_the_fit_s(rounds: tuple[bh.Posterior, bh.Posterior], number: int) -> None:
    """Of independent Normals the KL of a whole round is the sum over kinds and layers."""
    found = shifts(rounds[number])
    total = sum(shift.kl for layers in found.values() for shift in layers.values())
    assert total == pytest.approx(sum(rounds[number].report.kl.values()), rel=1e-4)
    assert total > 0.1


def test_an_update_is_held_against_the_round_before(
    rounds: tuple[bh.Posterior, bh.Posterior],
) -> None:
    before, after = (round_.guide for round_ in rounds)
    assert isinstance(before, NormalGuide) and isinstance(after, NormalGuide)

    def of(values: dict[str, Tensor]) -> Tensor:
        return torch.cat([values[f"lora.query.{side}"][1].flatten() for side in "AB"]).double()

    moved = (of(after.means()) - of(before.means())) / of(before.scales())
    ratios = of(after.scales()) / of(before.scales())
    pairs = [Normal(of(guide.means()), of(guide.scales())) for guide in (after, before)]
    found = shifts(rounds[1])["lora"][1]
    assert found.moved == pytest.approx(moved.square().mean().sqrt().item(), rel=1e-4)
    assert found.narrowed == pytest.approx(ratios.log().mean().exp().item(), rel=1e-4)
    assert found.kl == pytest.approx(kl_divergence(*pairs).sum().item(), rel=1e-3)


def test_means_drawn_from_the_prior_have_moved_by_one_sd() -> None:
    model = tiny_model((LoRA(rank=8),))
    guide = NormalGuide(model)
    for name, value in model.prior(model.sites).items():
        guide.loc[name.replace(".", "/")].data.copy_(value)
    posterior = bh.Posterior(model, guide, (bh.training.FitReport(1, "", bh.FitOptions()),))
    for shift in shifts(posterior)["lora"].values():  # of 512 weights
        assert shift.moved == pytest.approx(1.0, abs=0.15)
        assert shift.narrowed == pytest.approx(1.0, abs=1e-5)
        assert shift.kl == pytest.approx(512 / 2 * shift.moved**2, rel=1e-3)


def test_joint_posteriors_have_their_marginals() -> None:
    first = bh.fit(
        tiny_model(()), "laplace", tiny_examples(), components=1, max_steps=5, progress=False
    )
    second = first.update(tiny_examples(8, seed=1))
    old, new = first.sample(2000), second.sample(2000, seed=1)
    names = ("head.weight", "head.bias")
    q, p = (torch.cat([draws[n].flatten(1) for n in names], 1) for draws in (new, old))
    found = shifts(second)["head"][None]
    assert found.moved == pytest.approx(
        ((q.mean(0) - p.mean(0)) / p.std(0)).square().mean().sqrt().item(), abs=0.07
    )
    assert found.narrowed == pytest.approx(
        (q.std(0) / p.std(0)).log().mean().exp().item(), rel=0.03
    )


def test_points_are_infinitely_far() -> None:
    model = tiny_model((LoRA(rank=2),))
    families = {"head.*": "normal", "*": "delta"}
    found = shifts(bh.fit(model, families, tiny_examples(), max_steps=2, progress=False))
    assert found["lora"][0].kl == torch.inf and found["lora"][0].narrowed == 0
    assert 0 < found["head"][None].kl < torch.inf


def test_guides_that_tell_no_sds_are_no_points() -> None:
    """Those of their marginals, as in a later round."""
    model, data = tiny_model(()), tiny_examples()
    posterior = bh.fit(model, "mvn", data, max_steps=10, progress=False)
    draws = posterior.sample(4000)
    for each in (posterior, bh.Posterior.from_draws(model, draws)):
        found = shifts(each)["head"][None]
        sds = torch.cat([draws[s.name].std(0).flatten() / prior_sd(s) for s in model.sites])
        assert found.narrowed == pytest.approx(sds.log().mean().exp().item(), rel=0.05)
        assert 0 < found.kl < torch.inf


def prior_sd(site: Site) -> Tensor:
    return priors.default().sd(site).expand(site.shape).flatten()


def test_what_has_no_closed_form_is_refused() -> None:
    report = bh.training.FitReport(1, "", bh.FitOptions())
    for prior, words in (
        (dist.Laplace(0.0, 1.0), "is Laplace"),
        (priors.Hierarchical(), "also samples"),
    ):
        model = tiny_model(KINDS, prior=prior)
        with pytest.raises(PriorError, match=words):
            shifts(bh.Posterior(model, NormalGuide(model), (report,)))
    model = tiny_model(KINDS)
    with pytest.raises(GuideError, match="FunctionGuide"):
        shifts(bh.Posterior(model, FunctionGuide(lambda batch: None), (report,)))
