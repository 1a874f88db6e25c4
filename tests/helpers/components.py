"""What the tests of mixtures of fits share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import bhpeft_pyro as bh
from bhpeft_pyro.testing import tiny_examples, tiny_model

TEXTS = ["w5 w9 w12", "w6 w30", "w5"]
FIRST, SECOND = tiny_examples(16), tiny_examples(12, seed=1)


def fit(
    guide: Any = "normal", components: int = 3, of: bh.Model | None = None, **options: Any
) -> Any:
    options = {"max_steps": 4, "lr": 0.3, "progress": False, **options}
    return bh.fit(of or tiny_model(), guide, FIRST, components=components, **options)


def probabilities(posterior: bh.Posterior, samples: int = 6, **options: Any) -> Tensor:
    forecast = posterior.predict(TEXTS, samples, **options)
    assert isinstance(forecast, bh.forecast.ClassForecast)
    return forecast.probabilities


def state(posterior: bh.Posterior) -> dict[str, Tensor]:
    """A copy of its guide's tensors."""
    return {name: value.clone() for name, value in posterior.guide.state_dict().items()}


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def same(one: bh.Posterior, other: bh.Posterior) -> bool:
    return equal(one.guide.state_dict(), other.guide.state_dict())
