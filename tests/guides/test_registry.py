"""Guides by name, their options, and their sizes before they are made."""

from __future__ import annotations

from typing import Any

import pyro
import pytest
import torch

import bhpeft_pyro as bh
from bhpeft_pyro.errors import GuideError
from bhpeft_pyro.guides import GUIDES, budget
from bhpeft_pyro.testing import tiny_batch, tiny_model


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(
        GuideError,
        match=r"unknown guide 'gauss'; known: laplace, normal, delta, down only.*AutoIAF",
    ):
        bh.autoguide("gauss", tiny_model(()))
    for name in GUIDES:
        assert isinstance(bh.autoguide(name, tiny_model(())), bh.guides.Guide)


def test_an_unknown_option_names_guide_and_option() -> None:
    with pytest.raises(GuideError, match=r"normal.*does not take \{'rank': 3\}"):
        bh.autoguide("normal", tiny_model(()), rank=3)
    for name, wrong in (("laplace", {"rank": "8"}), ("iaf", {"hidden_dim": 64})):
        with pytest.raises(GuideError, match=f"{name}.*(does not take|rank=)"):
            bh.autoguide(name, tiny_model(()), **wrong)  # type: ignore[arg-type]
    with pytest.raises(GuideError, match=r"^autoguide: 'normal' .*scale=0\.0"):
        bh.autoguide("normal", tiny_model(()), init_scale=0.0)


@pytest.mark.filterwarnings("ignore:The `init_loc_fn` argument")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("normal", {}),
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
        guide = bh.autoguide(name, model, components=1, **options)
        guide(tiny_batch(4))  # Pyro's make their parameters when first called
    latents = sum(site.numel for site in model.sites)
    size = budget(name, latents, [site.shape for site in model.sites], **options)
    assert size is not None and size.latents == latents
    assert size.parameters == sum(p.numel() for p in guide.parameters())


def test_a_guide_too_large_is_refused_with_the_figures() -> None:
    message = r"it would take 34 latents, 1,224 parameters.*a lower rank.*'delta'"
    with pytest.raises(GuideError, match=message):
        bh.autoguide("AutoMultivariateNormal", tiny_model(()), max_bytes=16 * 1223)
    bh.autoguide("AutoMultivariateNormal", tiny_model(()), max_bytes=16 * 1224)
    dense = 16 * (4 * 34 + 34**2 + 32**2 + 2**2)  # bytes
    with pytest.raises(GuideError, match=r"'AutoGaussian': it would take 34 latents"):
        bh.autoguide("AutoGaussian", tiny_model(()), max_bytes=dense - 1)
    bh.autoguide("AutoGaussian", tiny_model(()), max_bytes=dense)
    for name in ({"*": "normal"}, "A only"):
        with pytest.raises(GuideError, match="max_bytes"):
            bh.autoguide(name, tiny_model(), max_bytes=1000)
    with pytest.raises(GuideError, match="unknown guide"):
        budget("a guide of your own", 10)
    assert budget("down only", 10) is None  # it depends on the sites


def test_without_random_weights_there_is_no_size_to_refuse() -> None:
    def fixed(sites: Any) -> dict[str, torch.Tensor]:
        return {
            s.name: pyro.deterministic(s.name, torch.zeros(s.shape), event_dim=len(s.shape))
            for s in sites
        }

    with pytest.raises(GuideError, match="no random weights"):
        bh.autoguide("laplace", tiny_model((), prior=fixed), components=1)
