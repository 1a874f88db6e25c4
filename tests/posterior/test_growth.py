"""New labels: old rows keep their posterior, new ones start at the prior, and then learn."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from exact import dense, hierarchical
from saves import load
from torch import Tensor

import bhpeft_pyro as bh
from bhpeft_pyro.data import LabelWarning
from bhpeft_pyro.errors import ConfigError, DataError, GuideError, LikelihoodError, PriorError
from bhpeft_pyro.guides import LaplaceGuide
from bhpeft_pyro.guides.earlier import Earlier
from bhpeft_pyro.posterior.growth import unknown_labels
from bhpeft_pyro.posterior.update import _learnt_classes
from bhpeft_pyro.priors import JointPrior, unpack
from bhpeft_pyro.testing import tiny_examples, tiny_model, tiny_tokenizer
from bhpeft_pyro.training import loop
from bhpeft_pyro.training.earlier_labels import with_earlier_texts

# Some rounds learn texts again.
pytestmark = pytest.mark.filterwarnings("ignore:data. .* that an earlier round has learnt")

OLD = {"text": ["w5 w20", "w6 w21", "w5 w22", "w6 w23"] * 4, "label": ["calm", "angry"] * 8}
NEW = {"text": ["w7 w20", "w7 w21", "w7", "w5 w30"] * 4, "label": (["sad"] * 3 + ["calm"]) * 4}
QUICK: dict[str, Any] = {"max_steps": 8, "lr": 0.3, "progress": False}


FAMILIES: list[Any] = ["normal", "laplace", {"*.A": ("delta", {"width": 0.1}), "*": "normal"}]


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def old(request: pytest.FixtureRequest) -> bh.Posterior:
    """A first round, and of other guides than "normal" a second one."""
    model = tiny_model(bh.presets.lora(rank=1), aligned=True)
    posterior = bh.fit(model, request.param, OLD, components=1, **{**QUICK, "max_steps": 2})
    if request.param == "normal":
        return posterior
    return posterior.update({name: column[:6] for name, column in OLD.items()})


@pytest.fixture(scope="module")
def head() -> bh.Posterior:
    return bh.fit(tiny_model((), aligned=True), "normal", OLD, **QUICK)


def rows(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Draws of the grown head's old rows."""
    return {
        name: value[..., :2, :] if name == "head.weight" else value[..., :2]
        for name, value in values.items()
        if name.startswith("head.")
    } | {name: value for name, value in values.items() if not name.startswith("head.")}


def covariance(guide: Any) -> Tensor:
    """Of all weights, in the order of the means: (D, D)."""
    if isinstance(guide, LaplaceGuide):
        return dense(guide.covariance).float()
    scales = guide.scales()
    sds = [scales.get(name, torch.zeros_like(m)).flatten() for name, m in guide.means().items()]
    return torch.cat(sds).square().diag()


def test_old_rows_keep_their_posterior_and_new_ones_have_the_first_prior(old: bh.Posterior) -> None:
    grown = old.grow(["sad"])
    before, after = old.guide.means(), grown.guide.means()  # type: ignore[operator]
    assert list(before) == list(after)
    for name, value in rows(after).items():
        assert torch.equal(value, before[name]), name
    for name in ("head.weight", "head.bias"):
        assert not after[name][2].any()  # the prior's mean
    # Where in the grown vector each weight is that was there before.
    marks = {name: torch.full_like(value, -1.0) for name, value in after.items()}
    was = torch.cat([value.flatten() for value in {**marks, **_marked(marks)}.values()])
    joint, grown_joint = covariance(old.guide), covariance(grown.guide)
    kept, new = was.nonzero()[:, 0], (was == 0).nonzero()[:, 0]
    assert torch.equal(grown_joint[kept[:, None], kept], joint)
    assert not grown_joint[kept[:, None], new].any()
    expected = torch.tensor([16**-0.5] * 16 + [1.0])  # a logit's sd of 1 in the sites' units
    if isinstance(old.first_priors[0], JointPrior):  # but for what has been set since
        weight, bias = (first_prior(old, "scale")[name] for name in ("head.weight", "head.bias"))
        assert (weight == weight[:1]).all() and (bias == bias[0]).all()
        expected = torch.cat([weight[0], bias[:1]])
    torch.testing.assert_close(grown_joint[new[:, None], new], torch.diag(expected.square()))
    assert grown.columns.label_names == ("angry", "calm", "sad")
    assert grown.lineage is old.lineage  # it is no round


def first_prior(posterior: bh.Posterior, part: str) -> dict[str, Tensor]:
    """The means or sds of the first prior of a Laplace approximation, by site."""
    (prior,) = posterior.first_priors
    assert isinstance(prior, JointPrior)
    covariance = prior.normal.covariance
    return unpack({"loc": prior.normal.loc, "scale": covariance.scale}[part], prior.shapes)


def _marked(marks: dict[str, Tensor]) -> dict[str, Tensor]:
    """Zero at the rows that are new."""
    return {
        name: torch.cat([marks[name][:2], torch.zeros_like(marks[name][2:])])
        for name in ("head.weight", "head.bias")
    }


def test_under_any_draw_old_labels_keep_their_logits(old: bh.Posterior) -> None:
    """So, with the covariances above, predictions among the old labels are what they were."""
    grown = old.grow(["sad", "glad"])
    weights = {name: value[:, None] for name, value in grown.sample(6).items()}
    batch = next(old.encode(OLD).batches(16))
    with torch.no_grad():
        new = grown.model.network(weights, batch)
        was = old.model.network(rows(weights), batch)
    assert new.shape[-1] == 4
    torch.testing.assert_close(new[..., :2], was)


def test_a_new_label_is_learnt(head: bh.Posterior) -> None:
    with pytest.raises(
        DataError, match=r"'sad' is not among the labels \('angry', 'calm'\); grow=True"
    ):
        head.update(NEW)
    with pytest.raises(DataError, match=r"'Calm' \(may mean 'calm'\)"):
        head.update({"text": ["w5"], "label": ["Calm"]})
    new = head.update(NEW, grow=True, max_steps=80)
    assert len(new.lineage) == 2 and new.report.parent == head.report.id
    forecast = new.predict(["w7 w40", "w7"], samples=64)
    assert forecast.label_names == ("angry", "calm", "sad")
    grown = head.grow(["sad"]).predict(["w7 w40", "w7"], samples=64)
    assert (forecast.probabilities[:, 2] > grown.probabilities[:, 2] + 0.1).all()


def test_rows_with_earlier_labels_stand_for_all_earlier_rows(
    head: bh.Posterior, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    kept = bh.fit(tiny_model((), aligned=True), "normal", OLD, **QUICK, keep_texts=True)

    def new_label(data: dict[str, Any], before: bh.Posterior = head, **more: Any) -> float:
        """The probability of the new label for earlier texts."""
        new = before.update(data, grow=True, max_steps=60, progress=False, **more)
        assert new.report.examples == len(data["text"])
        return new.predict(OLD["text"][:4], samples=0).probabilities[:, 2].mean().item()

    def counted(*given: Any) -> Any:
        learnt, handler = with_earlier_texts(*given)
        made.append((len(learnt), handler.learnt.tolist(), handler.times))
        return learnt, handler

    alone: dict[str, Any] = {"text": ["w7 w20", "w7 w21", "w7"] * 4, "label": ["sad"] * 12}
    monkeypatch.setattr(loop, "with_earlier_texts", lambda earlier, data: (data, None))
    before = new_label(NEW)
    with pytest.warns(LabelWarning, match="all rows have labels that are new.*keep_texts"):
        at_worst = new_label(alone)
    monkeypatch.setattr(loop, "with_earlier_texts", counted)
    assert new_label(NEW) < before - 0.02
    new_label(NEW, keep=0.5)
    # 16 rows were learnt, 4 of the round's have an earlier label; then half of them are kept.
    assert made == [(16, [True, True, False], 4.0), (16, [True, True, False], 2.0)]
    made.clear()
    # The texts of 16 rows, of which 4 differ. No warning.
    assert new_label(alone, kept) < at_worst - 0.3
    assert made == [(12 + 4, [True, True, False], 4.0)]


def test_a_kept_text_that_gets_a_new_label_says_nothing_of_it(head: bh.Posterior) -> None:
    data = head.grow(["sad"]).encode({"text": ["w5 w20", "w7"], "label": ["sad", "sad"]})
    texts = replace(head.encode({"text": ["w6 w21", "w5 w20"]}, labelled=False), labels=None)
    earlier = Earlier(16.0, learnt=torch.tensor([True, True, False]), texts=texts)
    learnt, handler = with_earlier_texts(earlier, data)
    assert learnt.texts == ("w5 w20", "w7", "w6 w21") and learnt.labels is not None
    assert learnt.labels.tolist() == [2, 2, 3] and handler is not None and handler.times == 16
    assert with_earlier_texts(earlier._replace(texts=texts.subset([1])), data) == (data, None)


def test_the_nll_of_a_round_is_that_of_its_own_rows() -> None:
    how: dict[str, Any] = {"components": 1, "keep_texts": True, **QUICK}
    last = bh.fit(tiny_model((), aligned=True), "laplace", OLD, **how)
    alone: dict[str, Any] = {"text": ["w7 w20", "w7 w21", "w7"] * 4, "label": ["sad"] * 12}
    # A step learns all 12 rows and 4 texts; the first is at the last point estimate.
    new = last.update(alone, grow=True, batch_size=16, max_steps=1)
    before = last.grow(["sad"]).predict(alone, samples=0).nlls().mean().item()
    step = new.report.history[0]
    assert step["nll"] == pytest.approx(before, rel=1e-4)
    assert step["loss"] > before  # what earlier rows say of the new label is in it


def test_kept_texts_count_among_the_rows_that_need_no_first_prior() -> None:
    examples, new = tiny_examples(60), {"text": ["w7 w20", "w7"] * 4, "label": [2] * 8}
    for keep, temperature in ((True, 0), (False, 1)):
        how: dict[str, Any] = {"max_steps": 2, "progress": False, "keep_texts": keep}
        last = bh.fit(tiny_model(()), "laplace", examples, components=1, **how)
        with warnings.catch_warnings(action="ignore", category=LabelWarning):
            assert last.update(new, grow=True).report.temperature == temperature


def test_without_new_labels_all_rows_count_once(head: bh.Posterior) -> None:
    grown = head.grow(["sad"])
    three = grown.update(NEW, max_steps=2, progress=False)  # no `grow`, and yet a new label
    learnt = [_learnt_classes(each) for each in (head, grown, three)]
    assert learnt[0] is None and learnt[2] is None
    assert learnt[1] is not None and learnt[1].tolist() == [True, True, False]
    data = head.encode(OLD)
    new = torch.tensor([False, False, True])
    for earlier in (None, Earlier(16.0), Earlier(0.0, learnt=~new)):
        assert with_earlier_texts(earlier, data) == (data, None)
    assert with_earlier_texts(Earlier(16.0, learnt=new), data) == (data, None)  # no earlier one


@pytest.mark.filterwarnings("ignore:data. the labels contradict")  # none is predicted as sad
def test_a_round_without_rows_of_a_grown_label_learns_that_no_earlier_text_has_it() -> None:
    """So it is no loss that afterwards the label counts as learnt."""
    more: dict[str, Any] = {"text": ["w5 w24", "w6 w25"] * 4, "label": ["calm", "angry"] * 4}
    alone: dict[str, Any] = {"text": ["w7 w20", "w7 w21", "w7"] * 4, "label": ["sad"] * 12}
    how: dict[str, Any] = {**QUICK, "max_steps": 60}
    first = bh.fit(tiny_model((), aligned=True), "normal", OLD, **how, keep_texts=True)
    grown = first.grow(["sad"]).update(more, max_steps=60)
    assert _learnt_classes(grown) is None
    sad = [
        last.update(alone, grow=True, max_steps=60).predict(OLD["text"], 0).probabilities[:, 2]
        for last in (first, grown)
    ]
    assert sad[1].mean() < sad[0].mean() + 0.03


def test_every_family_learns_new_labels_and_comes_back(old: bh.Posterior, tmp_path: Path) -> None:
    grown = old.grow(["sad"])
    grown.save(tmp_path)
    again = load(tmp_path)
    assert torch.equal(*(each.predict(OLD, 7).probabilities for each in (grown, again)))
    unseen = ["w7 w40", "w7"]
    here, there = (
        each.update(NEW, grow=True, max_steps=8).predict(unseen, 64).probabilities
        for each in (old, again)
    )
    assert torch.equal(here, there)
    before = grown.predict(unseen, 64).probabilities
    assert here[:, 2].mean() > before[:, 2].mean()


def test_the_first_priors_of_laplace_approximations_grow_with_the_head(tmp_path: Path) -> None:
    """Each has its own: around a start of its own, with scales of its own."""
    model = tiny_model(bh.presets.lora(rank=1), aligned=True)
    old = bh.fit(model, "laplace", OLD, components=2, **QUICK)
    grown = old.grow(["sad"]).grow(["glad"])
    for each, before in zip(grown.components, old.components, strict=True):
        for part, new in (("loc", 0.0), ("scale", None)):
            was, now = first_prior(before, part), first_prior(each, part)
            for name, value in rows(now).items():
                assert torch.equal(value, was[name])
            for name in ("head.weight", "head.bias"):
                assert now[name].shape[0] == 4
                expected = was[name][:1] if new is None else torch.tensor(new)
                assert (now[name][2:] == expected).all()
    here, there = (first_prior(each, "loc") for each in grown.components)
    assert all(not torch.equal(here[name], there[name]) for name in here if name.endswith(".A"))
    assert all(torch.equal(here[name], there[name]) for name in here if name.startswith("head."))
    grown.save(tmp_path)
    again = load(tmp_path)
    new = [each.update(NEW, keep=0.5) for each in (grown, again)]
    assert torch.equal(*(each.predict(OLD, 7).probabilities for each in new))
    # With nothing kept that is the prior of the round, new rows included.
    anew = grown.update(NEW, keep=0.0, max_steps=1)
    for each, before in zip(anew.components, grown.components, strict=True):
        prior, (first,), (old_first,) = each.model.prior, each.first_priors, before.first_priors
        assert isinstance(prior, JointPrior) and isinstance(first, JointPrior)
        assert isinstance(old_first, JointPrior)
        torch.testing.assert_close(prior.normal.loc, old_first.normal.loc)
        torch.testing.assert_close(prior.normal.stddev, first.normal.stddev)


def test_unknown_labels_are_found_in_every_form_of_data(head: bh.Posterior) -> None:
    assert unknown_labels(head, OLD) == ()
    assert unknown_labels(head, NEW) == ("sad",)
    assert unknown_labels(head, bh.data.encode(NEW, tiny_tokenizer(), kind="class")) == ("sad",)
    numbered = bh.fit(tiny_model(()), "normal", tiny_examples(), **QUICK)
    assert unknown_labels(numbered, {"text": ["w5", "w6"], "label": [10, 3]}) == ("3", "10")
    assert unknown_labels(numbered, {"text": ["w5", "w6"], "label": [2.0, 0.0]}) == ("2",)
    assert unknown_labels(numbered, {"text": ["w5", "w6"], "label": ["2", "0"]}) == ("2",)
    assert unknown_labels(numbered, tiny_examples()) == ()
    with pytest.raises(DataError, match=r"'2' is not among the labels \('0', '1'\).*grow=True"):
        numbered.update({"text": ["w5", "w6"], "label": [0, 2]})
    new = {"text": ["w5", "w6", "w7"], "label": [60, 2, 0]}
    for data in (new, bh.data.encode(new, tiny_tokenizer(), kind="class")):
        grown = numbered.update(data, grow=True)
        assert grown.columns.label_names == ("0", "1", "2", "60")
        assert grown.predict(["w5"], samples=2).probabilities.shape == (1, 4)


def test_data_that_can_be_read_but_once_are_learnt(head: bh.Posterior) -> None:
    rows = [{"text": f"w{i}", "label": ("sad", "calm")[i % 2]} for i in range(20, 26)]
    grown = head.update(iter(rows), grow=True)
    assert grown.report.examples == 6 and "sad" in grown.columns.label_names  # type: ignore[operator]


def test_a_label_that_is_another_but_for_its_case_is_noted(head: bh.Posterior) -> None:
    known = head.columns.label_names
    assert known is not None
    with pytest.warns(UserWarning, match=f"'{known[0]}' and '{known[0].upper()} ' are two"):
        head.grow([f"{known[0].upper()} "])


def test_what_cannot_grow_is_refused(head: bh.Posterior) -> None:
    for labels in (["calm"], [], ["sad", "sad"], [" "]):
        with pytest.raises(ConfigError, match=r"labels=.*not in \('angry', 'calm'\)"):
            head.grow(labels)
    wrong: Any
    for wrong in (1, "sad", [3]):
        with pytest.raises(ConfigError, match="labels"):
            head.grow(wrong)
    assert head.grow(np.array(["sad"])).columns.label_names == ("angry", "calm", "sad")  # type: ignore[arg-type]
    data = {"text": ["w5", "w6"] * 4, "label": [0, 1] * 4}
    stars = tiny_model((), 1, likelihood=bh.likelihoods.OrderedLogistic(2))
    with pytest.raises(LikelihoodError, match="OrderedLogistic"):
        bh.fit(stars, "normal", data, **QUICK).grow(["2"])
    with pytest.raises(GuideError, match=r"point estimates .* head\.bias, head\.weight"):
        bh.fit(tiny_model(()), "delta", data, **QUICK).grow(["2"])
    with pytest.raises(PriorError, match="also samples tau"):
        bh.fit(tiny_model((), prior=hierarchical), "normal", data, **QUICK).grow(["2"])
    with pytest.raises(PriorError, match="StudentT"):
        prior = dist.StudentT(3.0, 0.0, 1.0)
        bh.fit(tiny_model((), prior=prior), "normal", data, **QUICK).grow(["2"])
