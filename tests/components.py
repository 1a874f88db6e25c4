"""What the tests of mixtures of fits share."""

from __future__ import annotations

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
    options = {"max_steps": 4, "lr": 0.3, "warmup": 0.0, "progress": False, **options}
    return bh.fit(of or tiny_model(), guide, FIRST, components=components, **options)


def probabilities(posterior: bh.Posterior, samples: int = 6, **options: Any) -> Tensor:
    forecast = posterior.predict(TEXTS, samples, **options)
    assert isinstance(forecast, bh.forecast.ClassForecast)
    return forecast.probabilities


def same(one: bh.Posterior, other: bh.Posterior) -> bool:
    states = one.guide.state_dict(), other.guide.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(value, states[1][name]) for name, value in states[0].items()
    )
