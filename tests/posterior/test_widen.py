"""A covariance for point estimates that are fitted already."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from laplace_fits import QUICK, guide_of
from saves import load

import bhpeft_pyro as bh
from bhpeft_pyro.errors import DataError, GuideError
from bhpeft_pyro.testing import tiny_examples, tiny_model


def test_widening_points_is_fitting_the_default() -> None:
    """The same points, so the same posterior; and their predictions stay."""
    rows = tiny_examples(80)
    points = bh.fit(tiny_model(), "delta", rows, components=2, max_steps=20, progress=False)
    fitted = bh.fit(tiny_model(), "laplace", rows, components=2, max_steps=20, progress=False)
    wide = points.widen(rows)
    unseen = tiny_examples(30, seed=5)
    assert wide.report.held_out == fitted.report.held_out == 16
    one, other = (each.predict(unseen) for each in (wide, fitted))
    torch.testing.assert_close(one.probabilities, other.probabilities, atol=2e-3, rtol=2e-2)
    assert torch.equal(*(each.predict(unseen, 0).probabilities for each in (points, wide)))
    assert wide.update(tiny_examples(12, seed=8), max_steps=3).report.parent == wide.report.id


def test_widening_again_keeps_tau() -> None:
    first = bh.fit(tiny_model(()), "laplace", tiny_examples(), components=1, tau=30.0, **QUICK)
    later = first.update(tiny_examples(seed=1), tau=None, **QUICK)
    wide = later.widen(tiny_examples(seed=1))
    assert later.report.tau == wide.report.tau == pytest.approx(30.0)
    sds = guide_of(later).scales()
    for name, sd in guide_of(wide).scales().items():
        torch.testing.assert_close(sd, sds[name], rtol=1e-2, atol=0.0)


def test_widening_again_keeps_the_rank_and_the_prior() -> None:
    """The initial values at which `fit` centred the prior are known then."""
    rows = tiny_examples(24)
    model = tiny_model(bh.presets.lora(rank=1))
    guide = bh.autoguide("laplace", model, rank=3)
    fitted = bh.fit(model, guide, rows, **QUICK)
    wide = fitted.widen(rows)
    assert guide_of(wide).rank == guide_of(fitted).rank == 3
    for name, (mean, _) in fitted.model.prior.moments().items():  # type: ignore[attr-defined]
        torch.testing.assert_close(wide.model.prior.moments()[name][0], mean)  # type: ignore[attr-defined]
    assert wide.report.kl["weights"] == pytest.approx(fitted.report.kl["weights"], rel=1e-3)


def test_widening_keeps_the_rounds_before_and_no_metric_of_the_points(tmp_path: Path) -> None:
    points = {"*": ("delta", {"width": 0.01})}
    first = bh.fit(tiny_model(()), points, tiny_examples(), components=2, **QUICK)
    second = first.update(tiny_examples(seed=1), **QUICK)
    second.components[0].report.metrics["held_out/nll"] = 0.5
    wide = second.widen(tiny_examples(seed=1))
    wide.save(tmp_path)
    for found in (wide, load(tmp_path)):
        assert [each.id for each in found.lineage[:-1]] == [first.report.id]
        assert found.report.parent == first.report.id
        assert [len(part.lineage) for part in found.components] == [2, 2]
        assert found.components[0].report.metrics == {}
    history = bh.streams.History(tmp_path / "history")
    ids = [history.add(each) for each in (second.components[0], wide.components[0])]
    assert {*history.leaves} == {*ids} and len({*ids}) == 2


def test_widening_keeps_the_name_and_not_the_score_of_the_points() -> None:
    points = bh.fit(tiny_model(()), "delta", tiny_examples(), components=2, **QUICK)
    wide = points.with_report(name="monday", score="of points").widen(tiny_examples())
    assert wide.report.name == "monday" and wide.report.score != "of points"


def test_widening_in_a_later_round_leaves_the_first_prior_what_it_was() -> None:
    points = bh.fit(tiny_model(()), {"*": ("delta", {"width": 0.01})}, tiny_examples(), **QUICK)
    later = points.update(tiny_examples(seed=1), **QUICK)
    wide = later.widen(tiny_examples(seed=1))
    assert wide.first_priors == later.first_priors == (points.model.prior,)
    for site in wide.model.sites:
        first = guide_of(wide).unpack(guide_of(wide).first_scale)[site.name]
        torch.testing.assert_close(first, bh.priors.default().sd(site).expand(site.shape))
    anew = wide.update(tiny_examples(seed=2), keep=0.0, **QUICK)
    sds = anew.model.prior.moments()["head.weight"][1]  # type: ignore[attr-defined]
    assert (sds > 0.1).all()  # as wide as the first prior, where the round's own had 0.0025


def test_rows_that_the_fit_did_not_have_in_this_order_are_refused() -> None:
    """All were learnt, and none chose the width, without a word."""
    rows = tiny_examples(60)
    points = bh.fit(tiny_model(()), "delta", rows, **QUICK)
    for other in (rows.subset(range(59, -1, -1)), tiny_examples(60, seed=1)):
        with pytest.raises(DataError, match=r"data: these 60 .* not the 48 .* in another order"):
            points.widen(other)
        assert points.widen(other, validation=tiny_examples(9, seed=7)).report.examples == 60


def test_what_has_a_width_or_no_labels_cannot_be_widened() -> None:
    normal = bh.fit(tiny_model(()), "normal", tiny_examples(), **QUICK)
    with pytest.raises(GuideError, match=r"widen: MeanFieldGuide.* expected a 'delta' guide"):
        normal.widen(tiny_examples())
    points = bh.fit(tiny_model(()), "delta", tiny_examples(), **QUICK)
    with pytest.raises(DataError, match="column 'label' is missing"):
        points.widen(["w5 w9"])
