"""What a report says of convergence, and starts from which guides converge."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest

import bhpeft_pyro as bh
from bhpeft_pyro.testing import tiny_backbone, tiny_tokenizer

RATED = {"text": ["w5 w20", "w6 w21", "w7 w9", "w5 w22"] * 16, "label": [1.0, 3.0, 2.0, 1.5] * 8}
RATED["label"] += [0.5, 2.0, 3.0, 2.5] * 8  # the same texts: noise


def rated(guide: Any, **options: Any) -> bh.Posterior:
    network = bh.RandomPEFT(tiny_backbone(), (), bh.Head(1), tiny_tokenizer())
    model = bh.Model(network, likelihood=bh.likelihoods.Normal())
    guide = guide(model) if callable(guide) else guide
    return bh.fit(model, guide, RATED, progress=False, **options)


def own(model: bh.Model) -> Any:
    def guide(batch: Any) -> None:
        for site in model.sites:
            loc = pyro.param(f"{site.name}.loc", site.init())
            pyro.sample(site.name, dist.Normal(loc, 0.1 * site.unit).to_event(site.ndim))

    return guide


@pytest.mark.parametrize("family", ["AutoNormal", "AutoDiagonalNormal"])
def test_by_default_pyros_guides_come_near_normal(family: str) -> None:
    """As wide as the prior, the sd of the noise's logarithm alone cost several nats."""
    best = rated("normal").report
    assert rated(family).report.last("loss") < best.last("loss") + 0.2


def test_a_loss_that_still_falls_is_reported_whatever_the_guide() -> None:
    slow, quick = rated(own, lr=1e-3).report, rated(own, lr=0.05, epochs=60).report
    assert slow.falling and "the loss still falls" in str(slow)
    assert not quick.falling and "the loss still falls" not in str(quick)


@pytest.mark.parametrize("guide", [own, "delta"])
def test_up_to_sixteen_steps_are_too_few_for_a_verdict(guide: Any) -> None:
    # At temperature 1 no held-out rows choose the state of the point estimate.
    options: dict[str, Any] = {"lr": 0.01, "temperature": 1.0}
    some, few = (rated(guide, max_steps=steps, **options).report for steps in (24, 15))
    assert some.falling and "the loss still falls; set more epochs" in str(some)
    assert not few.falling
