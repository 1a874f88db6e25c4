"""The guides' contract."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch

import bhpeft_pyro as bh
from bhpeft_pyro.errors import GuideError
from bhpeft_pyro.guides import Guide
from bhpeft_pyro.testing import tiny_examples, tiny_model


def test_what_a_guide_of_one_s_own_lacks_is_named() -> None:
    class Bare(Guide):
        def __init__(self, model: bh.Model) -> None:
            super().__init__()
            self.loc = torch.nn.ParameterDict({"w": torch.zeros(2, 16), "b": torch.zeros(2)})

        def forward(self, batch: Any = None) -> dict[str, torch.Tensor]:
            pairs = (("head.weight", "w"), ("head.bias", "b"))
            return {
                name: pyro.sample(name, dist.Normal(self.loc[k], 0.1).to_event(self.loc[k].dim()))
                for name, k in pairs
            }

    model = tiny_model(())
    fitted = bh.fit(model, Bare(model), tiny_examples(), max_steps=1, progress=False)
    assert fitted.predict(["w5"], samples=2).probabilities.shape == (1, 2)
    with pytest.raises(GuideError, match=r"Bare does not define means\(\)"):
        fitted.predict(["w5"], samples=0)
    with pytest.raises(GuideError, match=r"Bare does not define distributions\(\)"):
        fitted.update(tiny_examples(seed=1))
