"""The guides' contract."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch

import bhpeft_pyro as bh
from bhpeft_pyro.errors import GuideError, SaveError
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


def test_options_that_a_saved_guide_would_lack_are_named(tmp_path: Path) -> None:
    class Fixed(Guide):
        def __init__(self, model: bh.Model, width: float = 0.1) -> None:
            super().__init__()
            self.width, self.sites = width, model.sites
            self.loc = torch.nn.ParameterList([site.init() for site in model.sites])

        def forward(self, batch: Any = None) -> dict[str, torch.Tensor]:
            return {name: pyro.sample(name, q) for name, q in self.distributions().items()}

        def distributions(self) -> dict[str, Any]:  # neither detached nor copied
            pairs = zip(self.sites, self.loc, strict=True)
            return {
                s.name: dist.Normal(loc, self.width).expand(s.shape).to_event(s.ndim)
                for s, loc in pairs
            }

    model = tiny_model(())
    fitted = bh.fit(model, Fixed(model, 0.5), tiny_examples(), max_steps=1, progress=False)
    with pytest.raises(SaveError, match=r"guide: .*Fixed cannot be saved.*a value for width"):
        fitted.save(tmp_path / "run")
    before = fitted.as_prior().distributions["head.bias"].mean.clone()  # type: ignore[attr-defined]
    later = fitted.update(tiny_examples(seed=1), max_steps=2, lr=0.5, progress=False)
    prior: Any = later.model.prior
    assert torch.equal(prior.distributions["head.bias"].mean, before)
