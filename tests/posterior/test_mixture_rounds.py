"""Mixtures of fits in rounds and on disk: component by component."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from components import FIRST, SECOND, fit, probabilities, same
from onehot import FIT, assert_posterior, exactly, model, words
from saves import load

import bhpeft_pyro as bh
from bhpeft_pyro.errors import DataError
from bhpeft_pyro.posterior.learn import of_component
from bhpeft_pyro.testing import tiny_examples, tiny_model

FAMILIES = ["normal", "laplace"]


@pytest.mark.parametrize("guide", FAMILIES)
def test_each_component_is_updated_as_it_would_be_alone(guide: str) -> None:
    posterior = fit(guide, of=tiny_model(()))
    before = probabilities(posterior)
    second = posterior.update(SECOND, max_steps=3, keep=0.8)
    options = posterior.report.options.change(max_steps=3)
    pairs = zip(posterior.components, second.components, strict=True)
    for number, (old, new) in enumerate(pairs):
        alone = old.update(SECOND, options=of_component(options, number), keep=0.8)
        assert same(new, alone)
        assert new.report.history == alone.report.history
        assert new.report.parent == old.report.id
    assert torch.equal(probabilities(posterior), before)
    assert len({*map(id, second.priors)}) == 3
    assert len({*map(id, posterior.priors)}) == (3 if guide == "laplace" else 1)
    assert second.report.parent == posterior.report.id
    assert second.report.keep == 0.8
    assert [report.examples for report in second.lineage] == [16, 12]
    third = second.update(FIRST, again=True)
    assert third.report.options.max_steps == 3 and len(third.components[2].lineage) == 3


def test_data_that_were_split_are_not_learnt_twice() -> None:
    """Components know what they have learnt, and not what that was a part of."""
    posterior = fit("normal", of=tiny_model(()))
    posterior = posterior.with_report(data_with_held_out=SECOND.fingerprint)
    with pytest.raises(DataError, match="would count twice"):
        posterior.update(SECOND)
    posterior.update(SECOND, again=True)


@pytest.mark.filterwarnings("ignore:data. .* that an earlier round has learnt")
def test_rounds_equal_one_fit_on_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    exactly(monkeypatch)
    rounds = [words(count, seed) for count, seed in ((48, 1), (32, 2), (64, 3))]
    posterior: Any = bh.fit(model(), "normal", rounds[0], components=2, **FIT)
    for data in rounds[1:]:
        posterior = posterior.update(data)
    for each in posterior.components:
        assert_posterior(each.guide, [(data, 1.0) for data in rounds])


@pytest.mark.parametrize("guide", ["normal", "laplace"])
def test_new_labels_are_given_to_every_component(guide: str) -> None:
    posterior = fit(guide, of=tiny_model(()))
    rows = {"text": ["w5 w9", "w6", "w7 w8", "w7"], "label": [0, 1, 2, 2]}
    with pytest.raises(bh.errors.DataError):
        posterior.update(rows)
    grown = posterior.update(rows, grow=True)
    assert [each.guide.means()["head.bias"].shape for each in grown.components] == [(3,)] * 3
    assert len({id(each.model.network) for each in grown.components}) == 1
    assert probabilities(grown).shape == (3, 3)


# On disk


@pytest.mark.parametrize("guide", [*FAMILIES, "delta"], ids=str)
def test_what_is_loaded_predicts_the_same(guide: Any, tmp_path: Path) -> None:
    posterior = fit(guide, of=tiny_model(()))
    rounds = [posterior]
    if guide != "delta":
        rounds.append(posterior.update(SECOND))
    for number, each in enumerate(rounds):
        each.save(tmp_path / str(number))
        loaded = load(tmp_path / str(number))
        assert loaded.lineage == each.lineage
        for mixture in (loaded, each):
            own_priors = len({*map(id, mixture.priors)}) == 3
            assert own_priors == (number == 1 or guide == "laplace")
        assert torch.equal(probabilities(loaded), probabilities(each))
        assert [c.lineage for c in loaded.components] == [c.lineage for c in each.components]
        assert repr(loaded) == repr(each)
        if guide != "delta":
            data = (SECOND, tiny_examples(9, seed=4))[number]
            for keep in (1.0, 0.7):  # which asks for the first prior, of each its own
                updated = (p.update(data, keep=keep) for p in (each, loaded))
                assert torch.equal(*map(probabilities, updated))
    assert [path.name for path in (tmp_path / "0").iterdir()] == ["posterior.safetensors"]
