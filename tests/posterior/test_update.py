"""Updating: yesterday's posterior is today's prior, and stays as it was."""

from __future__ import annotations

import copy
import math
import warnings
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pyro
import pytest
import torch
from components import FIRST, SECOND, TEXTS, equal, state
from pyro.infer.autoguide import AutoNormal
from scipy.optimize import minimize_scalar
from torch.optim import SGD

import bhpeft_pyro as bh
from bhpeft_pyro.diagnostics import sbc
from bhpeft_pyro.errors import (
    BHPEFTWarning,
    ConfigError,
    DataError,
    FitError,
    GuideError,
    PriorError,
)
from bhpeft_pyro.guides import PriorGuide
from bhpeft_pyro.model.likelihoods import Normal, OrderedLogistic
from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_model, tiny_tokenizer


def fit(model: bh.Model | None = None, guide: Any = "normal", **options: Any) -> bh.Posterior:
    options = {"max_steps": 12, "lr": 0.3, "progress": False, **options}
    return bh.fit(tiny_model() if model is None else model, guide, FIRST, **options)


@pytest.fixture(scope="module")
def first() -> bh.Posterior:
    """A first round, which no test may change."""
    return fit()


def test_the_posterior_becomes_the_prior(first: bh.Posterior) -> None:
    before = state(first)
    second = first.update(SECOND)
    trace = pyro.poutine.trace(second.model.prior).get_trace(second.model.sites)
    for site in second.model.sites:
        key = site.name.replace(".", "/")
        prior = trace.nodes[site.name]["fn"].base_dist
        assert torch.equal(prior.loc, before[f"loc.{key}"])
        assert torch.equal(prior.scale, before[f"log_scale.{key}"].exp())
    # It started at the prior: at the first step there is no KL, and later there is.
    history = second.report.history
    assert history[0]["kl"] == pytest.approx(0.0, abs=1e-4)
    assert history[-1]["kl"] > 1e-3


def test_the_earlier_posterior_does_not_change() -> None:
    first = fit()
    before, model, lineage = state(first), first.model, first.lineage
    forecast = first.predict(TEXTS, samples=5)
    prior = first.as_prior()
    scale = prior.distributions["head.weight"].base_dist.scale.clone()
    second = first.update(SECOND)
    assert equal(state(first), before)
    assert not equal(state(second), before)
    assert torch.equal(first.predict(TEXTS, samples=5).probabilities, forecast.probabilities)
    assert first.model is model and first.lineage is lineage
    # A prior is a snapshot: training the guide on does not move it.
    with torch.no_grad():
        for parameter in first.guide.parameters():
            parameter.add_(1.0)
    assert torch.equal(prior.distributions["head.weight"].base_dist.scale, scale)
    assert torch.equal(prior.distributions["head.weight"].mean, before["loc.head/weight"])


def test_stopping_an_update_leaves_the_earlier_posterior() -> None:
    class Interrupted(SGD):
        def step(self, closure: Any = None) -> None:
            super().step(closure)
            raise KeyboardInterrupt

    first = fit()
    before = state(first)
    forecast = first.predict(TEXTS, samples=5)
    random = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        first.update(SECOND, optimizer=lambda found: Interrupted(found, lr=1e-3))
    assert torch.equal(torch.get_rng_state(), random)
    assert equal(state(first), before)
    assert torch.equal(first.predict(TEXTS, samples=5).probabilities, forecast.probabilities)
    assert len(first.lineage) == 1
    assert equal(state(first.update(SECOND)), state(fit().update(SECOND)))  # and can be done again


def test_rounds_and_options_are_handed_on() -> None:
    first = fit(temperature=0.5, particles=2, batch_size=6, seed=9)
    second = first.update(SECOND, max_steps=3)
    third = second.update(FIRST, again=True)
    assert [report.examples for report in third.lineage] == [16, 12, 16]
    assert third.lineage[:2] == second.lineage and second.lineage[0] is first.report
    assert third.lineage[0].data == FIRST.fingerprint == third.lineage[2].data
    assert third.lineage[1].data == SECOND.fingerprint
    assert [report.steps for report in third.lineage] == [12, 3, 3]
    options = third.report.options
    assert (options.temperature, options.particles, options.batch_size) == (0.5, 2, 6)
    assert (options.seed, options.max_steps) == (9, 3)
    assert "round 3" in repr(third)
    again = bh.FitOptions(max_steps=2, progress=False)
    fresh = second.update(FIRST, options=again, again=True)
    assert fresh.report.temperature == 1.0


def test_rows_that_come_again_in_part_are_counted(first: bh.Posterior) -> None:
    """An export of all data so far, in place of the new rows; and a text that comes twice."""
    new = SECOND.subset(range(8))
    known = FIRST.hashes.tolist()
    assert not {*known} & {*new.hashes.tolist()}
    both = new.concat(FIRST.subset(range(3)))
    with pytest.warns(UserWarning, match=r"^data: 3 of 11 rows have the text of a row that an ear"):
        first.update(both, max_steps=1)
    with warnings.catch_warnings(action="error"):
        first.update(both, max_steps=1, again=True)
        first.update(new.concat(SECOND.subset(range(8, 11)), FIRST.subset([0])), max_steps=1)
        first.replace(learnt_rows=None).update(both, max_steps=1)


def test_held_out_rows_that_were_learnt_are_counted() -> None:
    """Those that an earlier round held out may come again."""
    short: dict[str, Any] = {"max_steps": 1, "progress": False}
    held_out = tiny_examples(20, seed=7)
    options = {"components": 1, "validation": held_out, **short}
    first = bh.fit(tiny_model(()), "laplace", FIRST, **options)
    with warnings.catch_warnings(action="error"):
        first.update(SECOND, validation=held_out, **short)
    told = r"^validation: 35 of 35 rows have the text of a row that an earlier round has learnt"
    with pytest.warns(UserWarning, match=told):
        first.update(SECOND, validation=held_out.concat(FIRST.subset(range(15))), **short)


@pytest.mark.parametrize("grow", [False, True])
def test_rows_of_a_file_have_its_numbers(tmp_path: Path, grow: bool) -> None:
    posterior = bh.fit(tiny_model(()), "normal", tiny_examples(), max_steps=2, progress=False)
    file = tmp_path / "new.csv"
    file.write_text("text,label\nw5 w6,0\nw6 w7,1\nw7 w8,\nw8 w9,1\n")
    with pytest.raises(DataError, match=r"new\.csv, column 'label', row 4: the label is missing"):
        posterior.update(file, grow=grow)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("epoch", "epochs$"),
        ("xyz", "epochs, .*progress$"),
    ],
)
def test_an_unknown_option_is_named_with_the_nearest(name: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}=1: no such option; expected {expected}"):
        fit(**{name: 1})


def test_epochs_are_counted_anew_after_a_round_of_so_many_steps() -> None:
    """An inherited `max_steps` would win over them, in silence."""
    first = fit(max_steps=5, batch_size=8)
    assert first.update(SECOND, epochs=2).report.steps == 2 * -(-len(SECOND) // 8)
    assert first.update(SECOND, max_steps=3).report.steps == 3
    with pytest.raises(ConfigError, match="epochs=2, max_steps=3: each says how long the fit is"):
        first.update(SECOND, epochs=2, max_steps=3)
    with pytest.raises(ConfigError, match=r"validation=0\.2: expected rows, or None"):
        first.update(SECOND, validation=0.2)


def test_a_warning_points_at_the_line_that_asked(first: bh.Posterior) -> None:
    """A line inside the package would be shown once, for all fits of a notebook."""
    with pytest.warns(BHPEFTWarning, match="an earlier round has learnt") as given:
        first.update(SECOND.concat(FIRST.subset(range(4))), max_steps=1)
    assert {Path(one.filename).name for one in given} == {Path(__file__).name}


def test_a_point_estimate_takes_batches_of_any_size() -> None:
    """It has one draw; others share a batch among theirs."""
    quick: dict[str, Any] = {"max_steps": 3, "progress": False}
    points = bh.fit(tiny_model(()), "delta", FIRST, **quick, batch_size=1)
    assert points.report.steps == 3
    later = partial(fit().update, SECOND)
    for fitted in (partial(bh.fit, tiny_model(()), "normal", FIRST), later):
        with pytest.raises(ConfigError, match="batch_size=6 must be a multiple of 4"):
            fitted(**quick, batch_size=6)


def test_the_way_text_is_read_is_handed_on() -> None:
    columns = bh.Columns(text="words", label="mood", max_length=3, label_names=["calm", "angry"])
    rows = {"words": ["w5 w9", "w6 w8"] * 4, "mood": ["calm", "angry"] * 4}
    options: dict[str, Any] = {"max_steps": 3, "progress": False}
    first = bh.fit(
        tiny_model(),
        "normal",
        rows,
        columns=columns,
        **options,
    )
    # Only one of the classes occurs, by name: its index is that of the first round.
    second = first.update({"words": ["w7", "w8 w9"], "mood": ["angry", "angry"]})
    forecast = second.predict({"words": ["w7", "w5"], "mood": ["angry", "calm"]}, samples=2)
    assert forecast.labels.tolist() == [1, 0]
    assert tuple(forecast.label_names) == ("calm", "angry")
    with pytest.warns(UserWarning, match="longer than 3 tokens"):
        second.predict({"words": ["w7 w8 w9 w10"]}, samples=1)


def test_a_round_with_one_class_only_is_learnt(first: bh.Posterior) -> None:
    sevens = {"text": ["w7 w9", "w7", "w7 w20 w21"], "label": [1, 1, 1]}
    second = first.update(sevens, max_steps=60)
    before = first.predict(["w7 w9"], samples=64).probabilities[0, 1]
    assert second.predict(["w7 w9"], samples=64).probabilities[0, 1] > before + 0.05
    assert second.evaluate({"text": ["w7 w30"], "label": [1]}, samples=8)["nll"] > 0


@pytest.mark.parametrize("likelihood", [Normal(1.0, 2.0), OrderedLogistic(2)])
def test_the_likelihood_s_own_sites_are_carried_too(likelihood: Any) -> None:
    kind = likelihood.kind
    data = {"text": ["w5 w9", "w6 w8"] * 4, "label": [0.5, 1.0] * 4}
    if kind == "class":
        data["label"] = [0, 1] * 4
    options: dict[str, Any] = {"max_steps": 4, "lr": 0.3, "progress": False}
    first = bh.fit(tiny_model((), 1, likelihood=likelihood), "normal", data, **options)
    (own,) = (site.name for site in likelihood.sites)
    second = first.update(data, again=True)
    prior = second.model.prior.distributions[own]
    assert torch.equal(prior.mean, first.guide.means()[own])
    assert not torch.equal(second.guide.means()[own], first.guide.means()[own])


def test_a_prior_for_other_sites_is_refused() -> None:
    prior = fit().as_prior()
    with pytest.raises(PriorError, match=r"site 'adapter\.down' .* there is no such site"):
        fit(tiny_model((*bh.presets.lora(rank=2), bh.peft.Adapter(2)), prior=prior))
    with pytest.raises(
        PriorError, match=r"'lora.query.A' has shape \(2, 3, 16\); .* its shape is \(2, 2, 16\)"
    ):
        fit(tiny_model(bh.presets.lora(rank=3), prior=prior))


def test_a_point_or_a_foreign_guide_is_no_prior() -> None:
    class OwnAuto(AutoNormal):
        """An autoguide of one's own, of which an object may be given."""

    model = tiny_model()
    foreign = OwnAuto(model)
    for guide, message in (("delta", "no width"), (foreign, r"autoguide\(OwnAuto, model\)")):
        posterior = fit(model, guide)
        before = copy.deepcopy(posterior.lineage)
        with pytest.raises(GuideError, match=message):
            posterior.update(SECOND)
        assert posterior.lineage == before


def test_a_later_fit_on_the_same_network_leaves_the_earlier_posterior() -> None:
    """Point estimates need no coordinates, so the network has none yet when they are fitted."""
    kinds = bh.presets.lora(rank=1)
    network = bh.RandomPEFT(tiny_backbone(), kinds, tokenizer=tiny_tokenizer())
    model, texts = bh.Model(network), ["w5 w9 w12", "w6", "w30 w31"]
    options: dict[str, Any] = {"max_steps": 4, "progress": False}
    found = []
    for guide, components in (("laplace", 2), ("normal", 1), ("AutoNormal", 1)):
        posterior = bh.fit(model, guide, tiny_examples(24), components=components, **options)
        found.append((posterior, posterior.predict(texts).probabilities))
    second = found[1][0]
    assert bool(second.model.network.coordinates.fitted)
    bh.fit(model, "normal", tiny_examples(24, seed=2), **options)
    bh.fit(second.model, "laplace", tiny_examples(24, seed=3), components=1, **options)
    many = [f"w{i} w{i + 1}" for i in range(5, 29)]
    sbc(model, lambda model, _: PriorGuide(model), many, replications=20, draws=4)
    for posterior, expected in found:
        assert torch.equal(posterior.predict(texts).probabilities, expected)


def test_a_student_of_the_new_posterior_when_asked(first: bh.Posterior) -> None:
    texts = tiny_examples(60, seed=3)
    plain, second = first.update(SECOND), first.update(SECOND, distill=texts)
    assert first.student is None and second.student is not None
    assert second.student.report.round == second.report.id
    assert equal(state(second), state(plain))  # the round itself is the same
    unlabelled = {"text": [*texts.texts], "label": ["nobody looks at these"] * 60}
    again = first.update(SECOND, distill=unlabelled)
    assert again.student is not None and again.student.report.nll is None
    for name, value in second.student.weights.items():
        assert torch.equal(value, again.student.weights[name]), name
    third = second.update(tiny_examples(12, seed=4))
    assert third.student is None  # another posterior, of which it knows nothing


def test_too_few_texts_are_refused_before_the_round(
    first: bh.Posterior, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bhpeft_pyro.posterior.update.learn", Mock(side_effect=AssertionError))
    with pytest.raises(DataError, match=r"^distill: got 49 different texts; expected at least 50"):
        first.update(SECOND, distill=[f"w{i}" for i in range(49)] * 2)


def test_a_round_without_its_student_is_on_the_error(
    first: bh.Posterior, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, texts = state(first.update(SECOND)), tiny_examples(60, seed=3)
    for error in (FitError("not finite"), MemoryError("too few")):
        monkeypatch.setattr("bhpeft_pyro.posterior.distill.distil", Mock(side_effect=error))
        with pytest.raises(FitError, match=f"distill: {error}") as raised:
            first.update(SECOND, distill=texts)
        assert isinstance(raised.value.posterior, bh.Posterior)
        assert equal(state(raised.value.posterior), expected)
        assert raised.value.posterior.student is None


# Where a later round of the default length ends


def whole_step(posterior: bh.Posterior, data: Any, steps: int, **how: Any) -> torch.Tensor:
    """The mean that training alone would reach: with a length that is given, it is kept."""
    new: Any = posterior.update(data, max_steps=steps, **how)
    return new.guide.loc.detach()


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every round has texts of another kind than those before it."""
    monkeypatch.setattr("bhpeft_pyro.posterior.update.separation", lambda *_: 1.0)


@cache
def without_held_out(rows: int) -> bh.Posterior:
    options: dict[str, Any] = {"components": 1, "lr": 0.05, "progress": False}
    options |= {"temperature": 1.0, "tau": 1.0}  # so no rows are held out
    return bh.fit(tiny_model(aligned=True), "laplace", tiny_examples(rows), **options)


@pytest.mark.parametrize(
    ("shift", "before", "rows", "keep", "share"),
    [
        (1.0, 64, 64, 1.0, 0.5),
        (None, 64, 64, 1.0, 0.5),  # not known
        (0.5, 64, 64, 1.0, 1.0),  # of one kind
        (0.75, 128, 64, 1.0, 2 / 3),  # however much was learnt before
        (1.0, 64, 128, 1.0, 2 / 3),  # but more is learnt from more rows than before
        (1.0, 64, 64, 0.5, 2 / 3),
        (1.0, 64, 64, 0.0, 1.0),
    ],
)
def test_a_later_round_ends_between_the_last_point_and_its_own(
    monkeypatch: pytest.MonkeyPatch,
    shift: float | None,
    before: int,
    rows: int,
    keep: float,
    share: float,
) -> None:
    monkeypatch.setattr("bhpeft_pyro.posterior.update.separation", lambda *_: shift)
    first = without_held_out(before)
    data = tiny_examples(rows, seed=1)
    second: Any = first.update(data, keep=keep)
    reached = whole_step(first, data, second.report.steps, keep=keep)
    last: Any = second.guide.prior.loc
    expected = last + share * (reached - last)
    assert (reached - last).abs().max() > 0.01
    torch.testing.assert_close(second.guide.loc.detach(), expected, rtol=1e-4, atol=1e-6)


def test_a_head_alone_takes_the_whole_step() -> None:
    options: dict[str, Any] = {"components": 1, "lr": 0.05, "progress": False, "tau": 1.0}
    first = bh.fit(tiny_model(()), "laplace", tiny_examples(64), temperature=1.0, **options)
    second: Any = first.update(tiny_examples(64, seed=1))
    reached = whole_step(first, tiny_examples(64, seed=1), second.report.steps)
    assert (reached - second.guide.prior.loc).abs().max() > 0.01
    torch.testing.assert_close(second.guide.loc.detach(), reached)


@pytest.mark.usefixtures("apart")
@pytest.mark.filterwarnings("ignore:data. .* that an earlier round has learnt")
def test_a_new_label_takes_the_whole_step() -> None:
    """It has no earlier weights to be averaged with."""
    texts = [f"w{5 + i % 3} w{10 + i % 7} w{20 + i % 5}" for i in range(60)]
    old = {"text": texts, "label": [["a", "b"][i % 2] for i in range(60)]}
    new = {"text": texts, "label": [["a", "b", "c"][i % 3] for i in range(60)]}
    options: dict[str, Any] = {"components": 1, "lr": 0.05, "progress": False}
    options |= {"temperature": 1.0, "tau": 1.0}  # at an output scale of 1
    first = bh.fit(tiny_model(aligned=True), "laplace", old, **options)
    second = first.update(new, grow=True)
    whole = first.update(new, grow=True, max_steps=second.report.steps)
    ends = [one.guide.means()["head.weight"] for one in (first, second, whole)]
    assert ends[2][2].abs().max() > 0.01
    torch.testing.assert_close(ends[1][2], ends[2][2])
    share = 60 / (60 + first.report.examples)
    torch.testing.assert_close(ends[1][:2], ends[0] + share * (ends[2][:2] - ends[0]))
    biases = [one.guide.means()["head.bias"] for one in (second, whole)]
    torch.testing.assert_close(biases[0][2], biases[1][2])


def test_the_report_says_how_unlike_earlier_texts_are() -> None:
    first = fit(guide="laplace", components=2, max_steps=2)
    assert first.report.separation is None
    assert first.update(tiny_examples(40, seed=1)).report.separation is None  # 12 are too few
    first = first.update(tiny_examples(60, seed=4))
    other = [f"w{30 + i % 3} w{40 + i % 4} w{44 + i % 5}" for i in range(60)]
    alike = first.update(tiny_examples(60, seed=5)).report
    unlike = first.update({"text": other, "label": [i % 2 for i in range(60)]}).report
    assert alike.separation is not None and alike.separation < 0.7
    assert unlike.separation is not None and unlike.separation > 0.95
    assert unlike.components[1].separation == unlike.separation
    assert f"AUROC {unlike.separation:.2f}" in str(unlike)


# The output scale of a round without held-out rows


@pytest.mark.parametrize(("told", "share"), [(0.5, 1.0), (0.75, 0.5), (None, 0.0)])
def test_the_output_scale_is_that_which_suited_the_last_forecasts(
    monkeypatch: pytest.MonkeyPatch, told: float | None, share: float
) -> None:
    """By a search over the probabilities of both components together."""
    monkeypatch.setattr("bhpeft_pyro.posterior.update.separation", lambda *_: told)
    options: dict[str, Any] = {"components": 2, "lr": 0.05, "progress": False}
    first = bh.fit(tiny_model(aligned=True), "laplace", tiny_examples(64), **options)
    last: Any = first.components[0].report.output_scale
    lasts, components = [last, 0.5 * last], []  # as components of a first round may have
    for part, scale in zip(first.components, lasts, strict=True):
        part.guide.retune(part.guide.tau.item(), output_scale=scale)
        components.append(part.with_report(output_scale=scale))
    first = bh.Posterior.mixture(components).replace(novelty=first.novelty)
    data = tiny_examples(64, seed=1)
    parts = [part.predict(data, samples=0) for part in first.components]

    def loss(log: float) -> float:
        powers = [(math.exp(log) * part.log_probabilities).softmax(1) for part in parts]  # type: ignore[union-attr]
        fits = torch.stack(powers).mean(0)[range(64), data.labels].log().sum()  # type: ignore[index]
        return float(-fits + (log / 0.5) ** 2 / 2)

    best = minimize_scalar(loss, bounds=(-2, 2), method="bounded").x
    second = first.update(data)
    found = [math.log(part.report.output_scale or 0) for part in second.components]
    each = [share * (best + math.log(scale)) for scale in lasts]
    assert found == pytest.approx(each, abs=0.05)
    assert all(abs(best + math.log(scale)) > 0.1 for scale in lasts)  # they are not 1 anyway
    assert first.components[0].report.output_scale == last
    half = first.update(data, keep=0.5).components[0].report.output_scale
    assert half == pytest.approx((second.components[0].report.output_scale or 0) ** 0.5)
    assert first.update(data, max_steps=3).components[0].report.output_scale == 1


def test_new_labels_that_have_grown_before_have_no_scale_either(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bhpeft_pyro.posterior.update.separation", lambda *_: 0.5)
    texts = [f"w{5 + i % 3} w{10 + i % 7} w{20 + i % 5}" for i in range(60)]
    old = {"text": texts, "label": [["a", "b"][i % 2] for i in range(60)]}
    new = {"text": texts, "label": [["a", "b", "c"][i % 3] for i in range(60)]}
    options: dict[str, Any] = {"components": 1, "lr": 0.05, "progress": False}
    first = bh.fit(tiny_model(aligned=True), "laplace", old, **options)
    at_once = first.update(new, grow=True, again=True)
    before = first.grow(["c"]).update(new, again=True)
    assert at_once.report.output_scale == before.report.output_scale == 1.0
    known = first.grow(["c"]).update(old, again=True)
    assert known.report.output_scale != 1.0


def test_a_guide_that_is_fitted_again_has_no_scale_of_an_earlier_fit() -> None:
    options: dict[str, Any] = {"lr": 0.05, "progress": False}
    model = tiny_model(aligned=True)
    first = bh.fit(model, "laplace", tiny_examples(64), components=1, **options)
    guide: Any = copy.deepcopy(first.guide)
    guide.retune(1.0, output_scale=1.5)
    exact = {"tau": 1.0, "temperature": 1.0}  # no rows are held out
    again = bh.fit(first.model, guide, tiny_examples(64), **exact, **options)
    assert again.report.output_scale == 1
