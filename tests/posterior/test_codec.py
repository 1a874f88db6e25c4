"""Objects as plain data and tensors: parts of the package, and code of one's own that is given
again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from counts import COUNTS, Counts
from exact import independent
from pyro.infer.autoguide import AutoNormal
from saves import load
from torch import Tensor

import bhpeft_pyro as bh
from bhpeft_pyro.errors import ConfigError, SaveError
from bhpeft_pyro.guides import MeanFieldGuide
from bhpeft_pyro.model.likelihoods import (
    Categorical,
    Function,
    HeteroscedasticNormal,
    Likelihood,
    MultipleChoice,
    Normal,
    OrderedLogistic,
)
from bhpeft_pyro.testing import tiny_backbone, tiny_model, tiny_tokenizer

QUIZ = {
    "question": ["w5 w9", "w7", "w8 w8", "w20"],
    "choices": [["w9", "w10 w11", "w12"], ["w13", "w14"], ["w15", "w16 w17"], ["w18", "w19"]],
    "answer": [2, 0, 1, 0],
}
STARS = {"text": ["w5 w9", "w6 w8 w30", "w5", "w6 w12"], "label": [0, 1, 2, 1]}
RATINGS = {"text": ["w5 w9", "w6 w8 w30", "w5", "w6 w12"], "label": [0.5, 1.5, -2.0, 1.0]}
CLASSES = {"text": ["w5 w9", "w6 w8 w30", "w5", "w6 w12"], "label": ["no", "yes", "no", "yes"]}
DATA: list[tuple[Likelihood, dict[str, Any]]] = [
    (Categorical(), CLASSES),
    (OrderedLogistic(3), STARS),
    (MultipleChoice(), QUIZ),
    (Normal(1.0, 2.0), RATINGS),
    (HeteroscedasticNormal(0.5, 1.5), RATINGS),
]


def fit(
    likelihood: Likelihood | None = None,
    data: Any = None,
    kinds: Any = (),
    guide: Any = "normal",
    prior: Any = None,
    components: int | None = None,
) -> bh.Posterior:
    likelihood = Categorical() if likelihood is None else likelihood
    model = tiny_model(kinds, likelihood.outputs or 2, prior, likelihood)
    data = CLASSES if data is None else data
    how: dict[str, Any] = {"max_steps": 3, "lr": 0.3, "progress": False}
    return bh.fit(model, guide, data, components=components, **how)


def fields(forecast: Any) -> dict[str, Any]:
    return {k: v for k, v in vars(forecast).items() if v is not None}


def assert_same_forecast(one: Any, other: Any) -> None:
    one, other = fields(one), fields(other)
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, other[name]), name
        else:
            assert value == other[name], name


def test_numpys_numbers_come_back_as_plain_ones(tmp_path: Path) -> None:
    """As `labels.max() + 1` and a grid over ranks give them."""
    kinds = (bh.peft.LoRA(rank=np.int64(3), alpha=np.float32(4), layers=np.arange(1)),)
    network = bh.RandomPEFT(tiny_backbone(), kinds, bh.Head(np.int64(2)), tiny_tokenizer())
    prior = bh.priors.FunctionSpaceNormal(change=np.float32(0.25))
    fitted = bh.fit(bh.Model(network, prior), "normal", CLASSES, max_steps=1, progress=False)
    fitted.save(tmp_path / "run")
    again = load(tmp_path / "run").model
    assert again.network.kinds == (bh.peft.LoRA(rank=3, alpha=4.0, layers=(0,)),)
    assert again.network.head == bh.Head(2) and again.prior == fitted.model.prior


@pytest.mark.parametrize("changes", [{"name": None}, {"metrics": {"a": True}}])
def test_a_report_that_no_file_could_give_back_is_refused(changes: dict[str, Any]) -> None:
    """It was saved, over an older posterior too, and could not be loaded again."""
    with pytest.raises(ConfigError, match=next(iter(changes))):
        fit(*DATA[0]).with_report(**changes)


@pytest.mark.parametrize("guide", ["normal", "laplace"])
@pytest.mark.parametrize(("likelihood", "data"), DATA)
def test_every_likelihood_comes_back_in_both_rounds(
    likelihood: Likelihood, data: dict[str, Any], guide: str, tmp_path: Path
) -> None:
    first = fit(likelihood, data, guide=guide, components=2 if guide == "laplace" else 1)
    second = first.update(data, again=True)
    for posterior, name in ((first, "one"), (second, "two")):
        posterior.save(tmp_path / name)
        loaded = load(tmp_path / name)
        assert loaded.model.likelihood == likelihood
        assert loaded.lineage == posterior.lineage
        assert loaded.columns == posterior.columns
        assert_same_forecast(posterior.predict(data, 5), loaded.predict(data, 5))
    # The prior of the second round is there too: its KL is what it was.
    third, again = (each.update(data, again=True) for each in (second, load(tmp_path / "two")))
    assert third.report.history == again.report.history


# Priors and guides of one's own


def wide(sites: Sequence[Any]) -> dict[str, Tensor]:
    return independent(sites, 2.0)


def test_a_prior_of_one_s_own_is_asked_for_by_name(tmp_path: Path) -> None:
    posterior = fit(prior=wide)
    posterior.save(tmp_path / "function")
    with pytest.raises(SaveError, match=rf"prior: .*{__name__}:wide.*prior=") as error:
        load(tmp_path / "function")
    with pytest.raises(SaveError, match=r"prior: .*:wide'; got .*:tied"):
        load(tmp_path / "function", prior=tied)
    assert "0x" not in str(error.value)
    loaded = load(tmp_path / "function", prior=wide)
    assert_same_forecast(posterior.predict(CLASSES, 3), loaded.predict(CLASSES, 3))
    fit(prior=dist.Normal(0.0, 1.0)).save(tmp_path / "distribution")
    with pytest.raises(SaveError, match="PatternPrior'") as error:
        load(tmp_path / "distribution")
    assert "0x" not in str(error.value)
    assert load(tmp_path / "distribution", prior=dist.Normal(0.0, 1.0)).report.steps == 3


@pytest.mark.parametrize("guide", ["laplace", "normal"])
def test_a_distribution_given_as_prior_is_compared_by_its_parameters(
    tmp_path: Path, guide: str
) -> None:
    first = fit(guide=guide, prior=dist.Normal(0.0, 1.0), components=1)
    first.save(tmp_path)
    load(tmp_path, prior=dist.Normal(0.0, 1.0))
    if guide == "normal":  # the other file has the prior itself
        with pytest.raises(SaveError, match=r"prior: .*scale: 1\.0.*; got .*scale: 5\.0"):
            load(tmp_path, prior=dist.Normal(0.0, 5.0))


def tied(sites: Any) -> Any:
    """One tensor for two sites of the same shape."""
    values = {}
    for site in sites:
        if site.name == "lora.value.A":
            value = values["lora.query.A"]
            values[site.name] = pyro.deterministic(site.name, value, event_dim=site.ndim)
        else:
            normal = dist.Normal(0.0, 0.1 * site.unit).expand(site.shape).to_event(site.ndim)
            values[site.name] = pyro.sample(site.name, normal)
    return values


def test_a_prior_with_fewer_latents_than_weights_comes_back(tmp_path: Path) -> None:
    posterior = bh.fit(tiny_model(prior=tied), "normal", CLASSES, max_steps=2, progress=False)
    posterior.save(tmp_path)
    again = bh.Posterior.load(tmp_path, posterior.model.network.backbone, prior=tied)
    weights = again.sample(3)
    assert torch.equal(weights["lora.query.A"], weights["lora.value.A"])
    assert torch.equal(weights["head.weight"], posterior.sample(3)["head.weight"])


class OwnAuto(AutoNormal):
    """An autoguide of one's own."""


def test_a_guide_that_cannot_be_saved_leaves_the_disk_alone(tmp_path: Path) -> None:
    model = tiny_model(())
    posterior = bh.fit(model, OwnAuto(model), CLASSES, max_steps=3, progress=False)
    with pytest.raises(SaveError, match="guide: OwnAuto"):
        posterior.save(tmp_path / "new")
    assert not list(tmp_path.iterdir())


class OneScale(MeanFieldGuide):
    """A guide of one's own, with an option."""

    def __init__(self, model: bh.Model, init_scale: float = 0.3, note: Any = None) -> None:
        super().__init__(model, ("normal", {"init_scale": init_scale}))
        self.note = note

    def options(self) -> dict[str, Any]:
        return {"init_scale": 0.3, "note": self.note}


def point(batch: Any) -> None:
    """A guide function for a head alone."""
    for name, shape in (("head.weight", (2, 16)), ("head.bias", (2,))):
        loc = pyro.param(f"{name}.loc", torch.zeros(shape))
        pyro.sample(name, dist.Normal(loc, 0.1).to_event(len(shape)))


def test_a_guide_of_one_s_own_comes_back_with_its_class_or_function(tmp_path: Path) -> None:
    model = tiny_model(())
    for name, guide, code, other in (
        ("class", OneScale(model, note=("a", 1)), OneScale, point),
        ("function", point, point, OneScale),
    ):
        posterior = bh.fit(model, guide, CLASSES, max_steps=3, progress=False)
        folder = posterior.save(tmp_path / name)
        loaded = load(folder, guide=code)
        assert_same_forecast(posterior.predict(CLASSES, 3), loaded.predict(CLASSES, 3))
        assert_same_forecast(
            load(folder, guide=guide).predict(CLASSES, 3), loaded.predict(CLASSES, 3)
        )
        with pytest.raises(SaveError, match=rf"guide: .*{__name__}:{code.__name__}'"):
            load(folder)
        with pytest.raises(SaveError, match=rf"guide: .*:{code.__name__}'; got .*{other.__name__}"):
            load(folder, guide=other)
    assert load(tmp_path / "class", guide=OneScale).guide.note == ("a", 1)
    both = [OneScale(model), OneScale(model)]
    folder = bh.Posterior.of(model, both, CLASSES).save(tmp_path / "mixture")
    assert {type(each) for each in load(folder, guide=OneScale).guides} == {OneScale}


def test_a_guide_that_could_not_be_made_again_is_refused(tmp_path: Path) -> None:
    class Needs(MeanFieldGuide):
        def __init__(self, model: bh.Model, size: int) -> None:
            super().__init__(model)

        def options(self) -> dict[str, Any]:
            return {}

    model = tiny_model(())
    for guide, message in (
        (Needs(model, 3), "guide: Needs .*'size'"),
        (OneScale(model, note={1}), "guides.0.options.note"),
        (OneScale(model, note=print), "guides.0.options.note"),
    ):
        posterior = bh.fit(model, guide, CLASSES, max_steps=3, progress=False)
        with pytest.raises(SaveError, match=message):
            posterior.save(tmp_path / "own")
    assert not list(tmp_path.iterdir())


@dataclass(frozen=True)
class Louder(Normal):
    """A data class of one's own; `fit` sets the fields that it inherits."""

    factor: Any = 1.0


class Forgetful(Counts):
    """It keeps its argument under another name."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.speed = rate


def waits(outputs: Tensor, extra: Any) -> Any:
    return dist.Exponential(extra["hours"] * outputs[..., 0].exp())


def test_a_likelihood_of_one_s_own_comes_back_with_its_class_or_function(tmp_path: Path) -> None:
    hours = {**COUNTS, "label": [0.5, 4.0, 1.0, 9.0] * 3, "hours": [1.0, 2.0, 1.0, 2.0] * 3}
    for name, own, code, data in (
        ("plain", Counts(), Counts, COUNTS),
        ("fields", Louder(factor=(1.5, 2)), Louder, RATINGS),
        ("function", Function(waits, columns=("hours",)), waits, hours),
    ):
        posterior = fit(own, data)
        folder = posterior.save(tmp_path / name)
        loaded = load(folder, likelihood=code)
        assert_same_forecast(posterior.predict(data, 3), loaded.predict(data, 3))
        assert vars(loaded.model.likelihood) == vars(posterior.model.likelihood)
        assert vars(load(folder, likelihood=own).model.likelihood) == vars(loaded.model.likelihood)
        with pytest.raises(SaveError, match=rf"likelihood: .*:{code.__name__}'"):
            load(folder)
        with pytest.raises(SaveError, match=rf"likelihood: .*:{code.__name__}'; got .*:Normal'"):
            load(folder, likelihood=Normal)
    with pytest.raises(SaveError, match=r"likelihood\.options\.factor"):
        fit(Louder(factor={1}), RATINGS).save(tmp_path / "new")
    with pytest.raises(SaveError, match=r"likelihood: Forgetful .*'rate'"):
        fit(Forgetful(2.0), COUNTS).save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_posterior_of_no_round_comes_back(tmp_path: Path) -> None:
    """Of a guide that was trained by Pyro's own `SVI`, say."""
    model = tiny_model(())
    bh.Posterior(model, MeanFieldGuide(model), ()).save(tmp_path)
    assert bh.Posterior.load(tmp_path, tiny_backbone()).lineage == ()
