"""Ratings in their own units: by default a likelihood takes those of the first round."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from saves import load

import bhpeft_pyro as bh
from bhpeft_pyro.model.likelihoods import HeteroscedasticNormal, Normal, StudentT
from bhpeft_pyro.testing import tiny_model

TEXTS = [f"w{5 + i % 2} w{10 + i}" for i in range(24)]


def test_ratings_of_0_and_1000(tmp_path: Path) -> None:
    data = {"text": TEXTS, "label": [1000.0 * (i % 2) for i in range(24)]}
    model = tiny_model((), 1, likelihood=Normal())
    posterior = bh.fit(model, "normal", data, epochs=40, progress=False)
    low, high = posterior.predict(["w5 w11", "w6 w11"]).mean.tolist()
    assert low < 350 and high > 650
    own = Normal(center=500.0, spread=500.0)
    assert posterior.model.likelihood == own and model.likelihood == Normal()
    new = {"text": TEXTS, "label": [3.0] * 23 + [2.5e5]}
    with pytest.warns(UserWarning, match="250000 is 499 spreads from the centre of Normal"):
        later = posterior.update(new, max_steps=1, progress=False)
    assert later.model.likelihood == own
    saved = load(later.save(tmp_path / "it"))
    assert saved.model.likelihood == own


@pytest.mark.parametrize("kind", [Normal, HeteroscedasticNormal, StudentT])
def test_what_is_given_stays(kind: type[Normal | StudentT]) -> None:
    labels = torch.tensor([2.0, 4.0])
    assert kind().standardised(labels) == kind(3.0, 1.0)
    assert kind(center=5.0).standardised(labels) == kind(5.0, 1.0)
    assert kind(5.0, 2.0).standardised(labels) == kind(5.0, 2.0)
    assert kind().standardised(torch.full((3,), 7.0)) == kind(7.0, 1.0)
    assert kind().standardised(None) == kind(0.0, 1.0)
