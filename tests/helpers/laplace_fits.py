"""Fits of Laplace approximations that several tests share."""

from __future__ import annotations

from typing import Any

import bhpeft_pyro as bh
from bhpeft_pyro.guides import LaplaceGuide

NOISE = 2.0
PLAIN: dict[str, Any] = {"progress": False}
QUICK: dict[str, Any] = {"max_steps": 3, **PLAIN}
_FIT: dict[str, Any] = {
    "max_steps": 150,
    "batch_size": 64,
    "lr": 0.1,
    "temperature": 1.0,
    "tau": 1.0,
    "progress": False,
}


def guide_of(posterior: bh.Posterior) -> LaplaceGuide:
    assert isinstance(posterior.guide, LaplaceGuide)
    return posterior.guide


def exactly(
    model: bh.Model, examples: bh.data.Examples, rank: int | None = None, **options: Any
) -> bh.Posterior:
    """With as many directions as there are weights, unless a rank is given."""
    rank = rank or sum(site.numel for site in model.sites)
    guide = bh.autoguide("laplace", model, rank=rank)
    return bh.fit(model, guide, examples, **{**_FIT, **options})
