"""Guides by name, and their options."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch

import bhpeft_pyro as bh
from bhpeft_pyro.errors import GuideError
from bhpeft_pyro.guides import GUIDES
from bhpeft_pyro.testing import tiny_model


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


@pytest.mark.parametrize(
    ("constant", "message"), [("head.", "no random weights"), ("head.bias", "not sample head.bias")]
)
def test_a_laplace_guide_needs_random_weights_at_every_site(constant: str, message: str) -> None:
    def prior(sites: Any) -> dict[str, torch.Tensor]:
        return {
            s.name: pyro.deterministic(s.name, torch.zeros(s.shape), event_dim=s.ndim)
            if s.name.startswith(constant)
            else pyro.sample(s.name, dist.Normal(0.0, 0.1).expand(s.shape).to_event(s.ndim))
            for s in sites
        }

    with pytest.raises(GuideError, match=message):
        bh.autoguide("laplace", tiny_model((), prior=prior))
