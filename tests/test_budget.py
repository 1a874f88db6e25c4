"""Sizes of guides: as foretold, and refused before they are made."""

from __future__ import annotations

from typing import Any

import pyro
import pytest

import bhpeft_pyro as bh
from bhpeft_pyro.errors import GuideError
from bhpeft_pyro.guides import budget
from bhpeft_pyro.testing import tiny_batch, tiny_examples, tiny_model


@pytest.mark.filterwarnings("ignore:The `init_loc_fn` argument")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("normal", {}),
        ("lowrank", {"rank": 5}),
        ("delta", {}),
        ("AutoDelta", {}),
        ("AutoNormal", {}),
        ("AutoDiagonalNormal", {}),
        ("AutoLowRankMultivariateNormal", {}),
        ("AutoLowRankMultivariateNormal", {"rank": 3}),
        ("AutoMultivariateNormal", {}),
        ("AutoLaplaceApproximation", {}),
        ("structured", {}),
        ("laplace", {}),
        ("AutoIAFNormal", {}),
        ("AutoIAFNormal", {"num_transforms": 2, "hidden_dim": [40]}),
    ],
)
def test_parameters_are_as_many_as_foretold(name: str, options: dict[str, Any]) -> None:
    model = tiny_model(())
    with pyro.get_param_store().scope():
        guide = bh.autoguide(name, model, **options)
        guide(tiny_batch(4))  # Pyro's make their parameters when first called
    latents = sum(site.numel for site in model.sites)
    size = budget(name, latents, [site.shape for site in model.sites], **options)
    assert size is not None and size.latents == latents
    assert size.parameters == sum(p.numel() for p in guide.parameters())


def test_what_a_low_rank_guide_keeps_is_counted() -> None:
    model = tiny_model(bh.presets.bh_peft())
    posterior = bh.fit(
        model, bh.autoguide("lowrank", model, rank=8), tiny_examples(), max_steps=3, progress=False
    )
    size = budget("lowrank", sum(site.numel for site in model.sites), rank=8)
    kept = sum(buffer.numel() * 4 for buffer in posterior.guide.buffers())
    assert size is not None and kept < size.bytes


def test_a_guide_too_large_is_refused_with_the_figures() -> None:
    message = r"'AutoMultivariateNormal' would take 34 latents, 1,224 parameters.*'lowrank'"
    with pytest.raises(GuideError, match=message):
        bh.autoguide("AutoMultivariateNormal", tiny_model(()), max_bytes=16 * 1223)
    bh.autoguide("AutoMultivariateNormal", tiny_model(()), max_bytes=16 * 1224)
    assert budget("a guide of your own", 10) is None
